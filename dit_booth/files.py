"""Files that several processes share: written whole or not at all, and locks that end with their owner.

Standard library only, so that a sweep that has nothing to do answers at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SLOT = "DIT_BOOTH_SLOT"
"""Environment variable: where a sweep has put a process (``host:devices``); the lock tells it to other sweeps."""
WRITER = re.compile(r"\.(\d+)@(.+)\.part$")
"""The end of a partial file's name: number and machine of the process that writes it."""

PACKAGE = Path(__file__).parent


def packaged(name: str) -> Path:
    """Path of a file that the package brings: ``configs/demo.yaml``, ``sweeps/schedule.yaml``.

    In a checkout ``configs`` and ``sweeps`` lie in ``experiments/``.
    """
    installed = PACKAGE / name
    return installed if installed.exists() else PACKAGE.parent / "experiments" / name


def given_or_packaged(path: str, folder: str) -> Path:
    """`path` if there is such a file, else the file of that name in a folder that the package brings."""
    given = Path(path).expanduser()
    return given if given.exists() else packaged(f"{folder}/{path}")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end, in one step and on the disk; not after an error."""
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
    """Where this process writes what becomes `path`: two processes may write the same."""
    return path.with_name(f"{path.name}.{os.getpid()}@{socket.gethostname()}.part")


def remove_partials(folder: Path, of: str = "*") -> None:
    """Remove what killed processes have left half-written. Who lives, or may live on another machine, is let be."""
    for partial in folder.glob(f"{of}.part"):
        if _has_writer(partial.name):
            continue
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)  # two processes may clear up at once


def _has_writer(name: str) -> bool:
    """Whether the writer of a partial file may still be at it."""
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
    """Wait until the disk has a file, or a folder's entries."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_all(folder: Path) -> None:
    """Wait until the disk has a folder with all its files: before a marker names it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines. A last line without its end was cut off, and is left out."""
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Lock:
    """A folder's lock, held by one process or by the ranks of one run.

    These are the kernel's record locks on ``<folder>/<name>``: they end with their process, however it ends, and are
    not inherited by its children. Every rank holds a byte of the file, and only who gets all bytes becomes the owner:
    where one rank was killed and the others live on for a while, the folder stays theirs. What is shared has no owner.
    """

    def __init__(self, folder: Path, name: str = "lock") -> None:
        self.file = folder / name
        self.number = -1

    def take(self, slot: str | None = None) -> bool:
        """Become the owner (the first rank) if there is none. `slot` is told to others; default: this process's."""
        if not self._try():
            self.release()
            return False
        fcntl.lockf(self.number, fcntl.LOCK_UN, 0, 1)  # all bytes but the first: those of the other ranks
        os.ftruncate(self.number, 0)
        place = os.environ.get(SLOT, "") if slot is None else slot
        os.write(self.number, f"{socket.gethostname()} {os.getpid()} {place}\n".encode())
        return True

    def join(self, rank: int) -> None:
        """Hold the owner's lock too, as one of its further ranks."""
        self._open()
        fcntl.lockf(self.number, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def share(self) -> bool:
        """Hold it together with all others that share it; instead of owning it, if this process does."""
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
        """Whether another process holds it. (This process must not: closing the file would end its own lock.)"""
        assert self.number < 0, f"{self.file} is held by this process"
        if not self.file.is_file():
            return False
        free = self._try()
        self.release()
        return not free

    def owner(self) -> str:
        """Host, process number and slot of the last owner, for messages."""
        if self.number >= 0:  # to open and close the file once more would end this process's hold
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
