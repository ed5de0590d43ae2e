"""Stopping cleanly: SIGINT and SIGTERM set a flag that the training loop reads after its step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from dit_booth.data.example import Batch, Loader

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint of this moment is written."""


@contextlib.contextmanager
def reading(loader: Loader, start: int) -> Iterator[Iterator[Batch]]:
    """Yield the batches from index `start`, from reader processes that ignore Ctrl-C and the launcher's SIGTERM.

    Both reach the whole process group, and the current step still needs its batches. As the readers ignore SIGTERM,
    they are shut down here (by a private method of PyTorch's; without it they end with their iterator).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # inherited by the readers, which start now
    try:
        batches = loader.stream(start)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()


class StopFlag:
    """Set by SIGINT or SIGTERM."""

    is_set = False


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads after its step (the launcher sends both on Ctrl-C)."""
    flag = StopFlag()

    def stop(number: int, frame: FrameType | None) -> None:
        flag.is_set = True

    old = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
