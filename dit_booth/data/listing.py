"""Fingerprint a data set by the names and sizes of its files. Standard library only."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

LISTS = {"videobooth": "*.csv", "webvid": "*.csv", "metadata": "metadata.*", "shards": "*.tar"}
"""Glob of the files that list a format's examples; the folder itself does in formats that are not named here."""


def list_files(root: Path, format: str, glob: str = "") -> list[Path]:
    """Return the files that list a data set's examples, by a glob or the format's own; the folder if there is none."""
    pattern = glob or LISTS.get(format, "")
    return sorted(root.glob(pattern)) if pattern else [root]


def files_named(root: Path, format: str, list_file: Path) -> str:
    """Hash the names and sizes of the files that a list names, as far as the format tells, else of the whole folder."""
    return files_of(root, list_file) if LISTS.get(format) == "*.csv" else files_below(root)


def files_of(root: Path, list_file: Path) -> str:
    """Hash the names and sizes of the videos, masks and references that a CSV file in VideoBooth's format lists.

    Contents are not read (a data set may have a terabyte of videos), and modification times do not count (a copy is
    the same data). A file replaced by one of equal size is not detected, nor, within one process, a change after the
    first call for a CSV file (results are cached).
    """
    status = list_file.stat()
    return _files_of(os.fspath(root.resolve()), os.fspath(list_file), status.st_size, status.st_mtime_ns)


def files_below(root: Path) -> str:
    """Hash the names and sizes of all files below a folder, for formats without lists of their own; see `files_of`."""
    found = sorted(
        f"{path.relative_to(root)} {path.stat().st_size}\n" for path in root.rglob("*") if path.is_file()
    )
    return hashlib.sha256("".join(found).encode()).hexdigest()


@functools.cache
def _files_of(root: str, list_file: str, size: int, changed: int) -> str:
    with Path(list_file).open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = [(row.get("videoid") or "", row.get("page_dir") or "") for row in csv.DictReader(stream)]
    with ThreadPoolExecutor(max_workers=8) as pool:  # network drives answer slowly
        found = pool.map(lambda row: "".join(_row(root, *row)), rows, chunksize=64)
        return hashlib.sha256("".join(found).encode()).hexdigest()


def _row(root: str, videoid: str, page_dir: str) -> Iterator[str]:
    """Yield a line for every file of an example; a missing video has one too."""
    video = f"videos/{page_dir}/{videoid}.mp4"
    try:
        yield f"{video} {Path(root, video).stat().st_size}\n"
    except OSError:
        yield f"{video} -\n"
    for folder in ("masks", "references"):
        with suppress(OSError), os.scandir(Path(root, folder, videoid)) as entries:
            yield from sorted(
                f"{folder}/{videoid}/{entry.name} {entry.stat().st_size}\n" for entry in entries
            )
