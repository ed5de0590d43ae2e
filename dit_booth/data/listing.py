"""What tells one data set in files from another: the files that its lists name, by size. Standard library only."""

from __future__ import annotations

import csv
import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def files_of(root: Path, list_file: Path) -> str:
    """A hash of the names and sizes of the videos and masks that a CSV file in VideoBooth's format names.

    Sizes and not contents: a set has a terabyte of videos, and is stated in seconds. No times of change either: a copy
    is the same data. A file that was replaced by one of equal size is not noticed, nor is, in one process, what changes
    after the first call with a list (a sweep of many points asks for each).
    """
    status = list_file.stat()
    return _files_of(os.fspath(root.resolve()), os.fspath(list_file), status.st_size, status.st_mtime_ns)


@functools.cache
def _files_of(root: str, list_file: str, size: int, changed: int) -> str:
    with Path(list_file).open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = [(row.get("videoid") or "", row.get("page_dir") or "") for row in csv.DictReader(stream)]
    with ThreadPoolExecutor(max_workers=8) as pool:  # on a network drive each answer takes a while
        found = pool.map(lambda row: "".join(_row(root, *row)), rows, chunksize=64)
        return hashlib.sha256("".join(found).encode()).hexdigest()


def _row(root: str, videoid: str, page_dir: str) -> Iterator[str]:
    """A line for every file of an example; a video that lacks has one, too."""
    video = f"videos/{page_dir}/{videoid}.mp4"
    try:
        yield f"{video} {Path(root, video).stat().st_size}\n"
    except OSError:
        yield f"{video} -\n"
    try:
        with os.scandir(Path(root, "masks", videoid)) as entries:
            yield from sorted(f"masks/{videoid}/{entry.name} {entry.stat().st_size}\n" for entry in entries)
    except OSError:
        return
