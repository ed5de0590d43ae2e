"""The C library's heap on the CPU: what a training step frees, the next one asks for again."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
TRIM_THRESHOLD = 1 << 30
"""Bytes that are free at the heap's end from which it shrinks."""
MMAP_THRESHOLD = 1 << 26
"""Bytes from which a block is the system's own, mapped and unmapped each time."""


def keep_freed_memory() -> None:
    """Keep blocks that are freed for what comes next; nothing happens where the C library is not glibc.

    By default glibc gives them back to the system, which returns them page by page and zeroed: a step of the nano DiT
    met 44,000 page faults, a tenth of its time (experiments/bench/page_faults.py counts them).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt; no way to open the C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
