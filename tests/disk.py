"""A log of what reaches the disk, for tests of durability, in which everything does happen; and a disk that is full."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Let the kernel refuse to make any file of this process longer than `room` bytes (EFBIG, like ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class DiskLog(list[tuple[str, Path]]):
    """What this process has told the disk to keep ("sync") and has renamed to ("name"), in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        sync, rename = os.fsync, Path.replace

        def logged_sync(number: int) -> None:
            self.append(("sync", Path(f"/proc/self/fd/{number}").readlink()))
            sync(number)

        def logged_rename(path: Path, target: Path) -> Path:
            self.append(("name", target.resolve()))
            return rename(path, target)

        monkeypatch.setattr(os, "fsync", logged_sync)
        monkeypatch.setattr(Path, "replace", logged_rename)

    def synced_before(self, name: Path) -> set[Path]:
        """What was on the disk when a file got its name for the last time."""
        at = max(i for i, event in enumerate(self) if event == ("name", name.resolve()))
        return {path for kind, path in self[:at] if kind == "sync"}
