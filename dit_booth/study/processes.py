"""Process groups of points: how to end them, and how to describe their end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ERROR_LINES = 8
ERROR = re.compile(r"error( on rank \d+)?:")
"""Beginning of the line in which a run reports its error."""
EXIT = "exits with return code"
"""Part of the line that DeepSpeed's launcher logs for a failed rank; all that is known of a killed one."""


def end_groups(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End launchers and all processes of their sessions, and wait until they have ended; see `ending_group`."""
    left = [ending_group(process, grace) for process in processes]
    while left := [steps for steps in left if is_ending(steps)]:
        time.sleep(0.1)


def ending_group(process: subprocess.Popen[bytes], grace: float) -> Iterator[None]:
    """End a launcher and all processes of its session, step by step.

    SIGINT comes first, SIGTERM after `grace` seconds, then SIGKILL. Each item is a step; the iterator is exhausted when
    no process is left. So one loop can end several groups at once.
    """
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        if not _signal(process, number):
            return
        limit = time.monotonic() + patience
        while time.monotonic() < limit:
            yield
            if not _signal(process, 0):
                return


def is_ending(steps: Iterator[None]) -> bool:
    """Take the next step of `ending_group`; returns whether a process is left."""
    return next(steps, "none left") is None


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a launcher's group; returns whether a process is left in it."""
    process.poll()  # reaps the launcher itself, which would count as a process
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def error_lines(file: Path, start: int) -> list[str]:
    """Return the lines of a log, from byte `start` on, that report errors; without any, its last lines."""
    with file.open("rb") as read:
        read.seek(start)
        text = read.read().decode(errors="replace")
    # A progress bar rewrites its line after every \r.
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    errors = list(dict.fromkeys(line for line in lines if ERROR.match(line)))
    if errors:
        return errors[-ERROR_LINES:]
    own = [line for line in lines if line.strip() and (EXIT in line or not _of_launcher(line))]
    return own[-ERROR_LINES:] or ["it ended without output (killed?)"]


def _of_launcher(line: str) -> bool:
    return "[launch.py:" in line or "[runner.py:" in line


def exit_text(code: int) -> str:
    """Return an exit code and its signal: Python gives -9, a shell 137, DeepSpeed's launcher 247 for SIGKILL."""
    for number in (-code, code - 128, 256 - code):
        if 1 < number < 32:
            return f"exit code {code}: {signal.Signals(number).name}"
    return f"exit code {code}"
