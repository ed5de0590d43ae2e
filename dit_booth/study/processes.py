"""The processes of points: ending whole groups, and what is left of how they ended."""

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
"""How a line begins in which a run says what is wrong."""
EXIT = "exits with return code"
"""What DeepSpeed's launcher says of a rank that failed, the only word there is of one that was killed."""


def end_groups(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End launchers and all processes of their sessions, and wait for that; see `ending_group`."""
    left = [ending_group(process, grace) for process in processes]
    while left := [ends for ends in left if still(ends)]:
        time.sleep(0.1)


def ending_group(process: subprocess.Popen[bytes], grace: float) -> Iterator[None]:
    """End a launcher and all processes of its session: gently, after `grace` seconds firmly, and then at once.

    It takes a step whenever it is asked for its next item, and is exhausted when nobody is left: whoever ends one group
    can look after others meanwhile.
    """
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        if not _signal(process, number):
            return
        limit = time.monotonic() + patience
        while time.monotonic() < limit:
            yield
            if not _signal(process, 0):
                return


def still(ends: Iterator[None]) -> bool:
    """Whether a group that is being ended has anybody left; takes the next step."""
    return next(ends, "nobody") is None


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a launcher's group; whether anybody is left in it."""
    process.poll()  # takes the launcher's own exit: it would count as somebody
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def last_words(file: Path, start: int) -> list[str]:
    """The lines in which a run says what is wrong, or else its last ones."""
    with file.open("rb") as read:
        read.seek(start)
        text = read.read().decode(errors="replace")
    # A progress bar is one line, which it writes anew after every \r.
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    errors = list(dict.fromkeys(line for line in lines if ERROR.match(line)))
    if errors:
        return errors[-ERROR_LINES:]
    own = [line for line in lines if line.strip() and (EXIT in line or not _of_launcher(line))]
    return own[-ERROR_LINES:] or ["it ended without a word (killed?)"]


def _of_launcher(line: str) -> bool:
    return "[launch.py:" in line or "[runner.py:" in line


def ending(code: int) -> str:
    """How a launcher ended: Python tells a signal as -9, a shell as 137, DeepSpeed's launcher of its rank as 247."""
    for number in (-code, code - 128, 256 - code):
        if 1 < number < 32:
            return f"exit code {code}: {signal.Signals(number).name}"
    return f"exit code {code}"
