"""Turns on devices: a sweep launches a point while another still uses its devices; the point then waits for its turn.

Launching takes seconds of imports and building that need no device. Standard library only, like `dit_booth.files`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO

TURN = "DIT_BOOTH_TURN"
"""Environment variable that tells a process to wait for its turn."""


def await_turn() -> float:
    """Wait for this rank's turn if a sweep launched it early. Returns the seconds waited.

    The signal is a byte on the standard input, which launchers pass on to their ranks.

    Raises:
        KeyboardInterrupt: the sweep has ended, so no signal will come.
    """
    if TURN not in os.environ:
        return 0.0
    begin = time.perf_counter()
    if not os.read(sys.stdin.fileno(), 1):
        raise KeyboardInterrupt("the sweep ended before it was this run's turn; the same command starts it")
    return time.perf_counter() - begin


def give_turn(pipe: IO[bytes], ranks: int) -> None:
    """Let a launcher's ranks continue; `pipe` is its standard input."""
    with contextlib.suppress(BrokenPipeError), pipe:  # a process that has ended is judged by its files
        pipe.write(b"." * ranks)
