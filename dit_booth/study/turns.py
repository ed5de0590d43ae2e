"""Turns on devices: a sweep launches a point while another is still on its devices, and the point waits for its turn.

A launch is seconds of imports and building that need no device. Standard library only, like `dit_booth.files`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO

TURN = "DIT_BOOTH_TURN"
"""Environment variable: this process is to wait for its turn."""


def await_turn() -> float:
    """Wait until it is this rank's turn, if a sweep has launched it; the seconds that it waited.

    The turn is a byte on the standard input, which launchers hand down to their ranks. KeyboardInterrupt: there will be
    none, because the sweep has ended.
    """
    if TURN not in os.environ:
        return 0.0
    begin = time.perf_counter()
    if not os.read(sys.stdin.fileno(), 1):
        raise KeyboardInterrupt("the sweep ended before it was this run's turn; the same command starts it")
    return time.perf_counter() - begin


def give_turn(pipe: IO[bytes], ranks: int) -> None:
    """Let a launcher's ranks go on: `pipe` is its standard input."""
    with contextlib.suppress(BrokenPipeError), pipe:  # who is gone is judged by what it left, like any other
        pipe.write(b"." * ranks)
