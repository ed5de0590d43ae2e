"""Files that several processes share: atomic writes, and locks that end with their owner.

Standard library only, so that a sweep without work starts quickly.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SLOT = "DIT_BOOTH_SLOT"
"""Environment variable with the devices that a sweep gave a process (``host:devices``); stored in its lock."""
WRITER = re.compile(r"\.(\d+)@(.+)\.part$")
"""Suffix of a partial file's name: process id and host of its writer."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of writing to a disk that is full, whatever is read meanwhile."""

PACKAGE = Path(__file__).parent
CONFIGS = ("configs", "baselines")
"""Folders of the package that hold configurations of runs."""


def packaged(name: str) -> Path:
    """Return the path of a file of the package: ``configs/demo.yaml``, ``sweeps/schedule.yaml``.

    In a checkout ``configs``, ``baselines`` and ``sweeps`` lie in ``experiments/``.
    """
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / "experiments" / name


def locate(name: str | Path, *folders: str, beside: Path | None = None) -> Path:
    """Return the path of a YAML or JSON file by its name; `name` itself where there is none.

    Looked for are the path (relative to the folder `beside`, if given), then the file that the package has in one of
    `folders` (such as `CONFIGS`, or ``sweeps``), with or without ``.yaml``.
    """
    given = (beside or Path()) / Path(name).expanduser()
    known = [packaged(folder) / f"{name}{suffix}" for folder in folders for suffix in ("", ".yaml")]
    return next((file for file in (given, *known) if file.is_file()), given)


def within(field: str, root: Path, path: Path) -> Path:
    """Return `root / path`, checked to stay in `root` despite `..`, absolute paths, and links.

    Data sets are untrusted: their paths must not make a program read other files. field: what names the root.

    Raises:
        ValueError: naming the path.
    """
    if path.is_absolute() or ".." in path.parts or not (root / path).resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"path {str(path)!r} leads out of {field}={str(root)!r}; "
            "move the file into the root (a link must point inside), or correct the CSV file"
        )
    return root / path


def read_table(file: Path, needed: Collection[str], header: str) -> list[tuple[int, dict[str, str | None]]]:
    """Read a CSV file in UTF-8 whose first line names its columns: (line number, values by column).

    Values beyond the columns stand under the key None. header: what the first line must be, for the message.

    Raises:
        ValueError: the file cannot be read as such, or has not all `needed` columns.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{file}: has no column {', '.join(missing)}; the first line {header}")
            return [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file}: not a CSV file in UTF-8 ({error}); save it as one") from error
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a path to write to; on success rename it to `file` atomically, synced to disk; else remove it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(file)
    try:
        yield partial
        sync(partial)
        partial.replace(file)
        sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Return the temporary path for writing `path`, unique to this process."""
    return path.with_name(f"{path.name}.{os.getpid()}@{socket.gethostname()}.part")


def remove_partials(folder: Path, of: str = "*") -> None:
    """Remove partial files of killed processes; keep files whose writer may still be running."""
    for partial in folder.glob(f"{of}.part"):
        if _has_writer(partial.name):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)  # another process may remove it first


def _has_writer(name: str) -> bool:
    """Return True if the writer of a partial file may still be running."""
    writer = WRITER.search(name)
    if writer is None:
        return False
    if writer[2] != socket.gethostname():
        return True
    try:
        os.kill(int(writer[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(file) as partial:
        partial.write_text(text)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_all(folder: Path) -> None:
    """Flush a folder with all its files to disk, before a marker refers to it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line without a newline was cut off, and is ignored."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Lock:
    """A folder's lock, held by one process or by the ranks of one run.

    These are the kernel's record locks on ``<folder>/<name>``: they end with their process, however it ends, and are
    not inherited by its children. Every rank locks one byte of the file, and the owner must get all bytes: if one rank
    is killed and others still run, the folder stays locked. A shared lock has no owner.
    """

    def __init__(self, folder: Path, name: str = "lock") -> None:
        self.file = folder / name
        self.number = -1

    def take(self, slot: str | None = None) -> bool:
        """Become the owner (the first rank) if there is none. `slot` is stored for others; None: this process's."""
        if not self._try():
            self.release()
            return False
        fcntl.lockf(self.number, fcntl.LOCK_UN, 0, 1)  # all bytes but the first: those of the other ranks
        os.ftruncate(self.number, 0)
        place = os.environ.get(SLOT, "") if slot is None else slot
        os.write(self.number, f"{socket.gethostname()} {os.getpid()} {place}\n".encode())
        return True

    def join(self, rank: int) -> None:
        """Hold the owner's lock too, as another rank of its run."""
        self._open()
        fcntl.lockf(self.number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def share(self) -> bool:
        """Hold the lock together with other sharers; an owner gives up ownership for it."""
        if self.number < 0:
            self._open()
        try:
            fcntl.lockf(self.number, fcntl.LOCK_SH | fcntl.LOCK_NB, 0, 0)
        except (BlockingIOError, PermissionError):
            self.release()
            return False
        return True

    def release(self) -> None:
        if self.number >= 0:
            os.close(self.number)
        self.number = -1

    def held(self) -> bool:
        """Return True if another process holds it. This process must not: closing the file ends its own lock."""
        assert self.number < 0, f"{self.file} is held by this process"
        if not self.file.is_file():
            return False
        free = self._try()
        self.release()
        return not free

    def owner(self) -> str:
        """Return host, process number and slot of the last owner, for messages."""
        if self.number >= 0:  # opening and closing the file again would end this process's lock
            return os.pread(self.number, 4096, 0).decode().strip()
        return self.file.read_text().strip() if self.file.is_file() else ""

    def _try(self) -> bool:
        self._open()
        try:
            fcntl.lockf(self.number, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 0)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _open(self) -> None:
        assert self.number < 0, f"{self.file} is held by this process"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.number = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
