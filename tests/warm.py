"""Programs in processes that have torch, DeepSpeed and the rest already: forks of one that has imported them.

A start's imports are ten seconds of CPU, and most tests of a run are not about them. Those of the launcher, of sweeps
and of what is imported when take new interpreters. The forks do not wait for the disk either.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
AS_INSTALLED = str(Path(__file__).parent / "as_installed")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


def sync_nothing(number: int) -> None:
    """In the place of os.fsync: a killed process loses nothing that it wrote, and no test cuts the power."""


def environment(**more: str) -> dict[str, str]:
    """Of a program: this process's without what a launcher sets, one thread, a user's packages."""
    own = {name: value for name, value in os.environ.items() if name not in RANKS}
    return own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": AS_INSTALLED} | more


class Forked:
    """A program that was started so; the part of subprocess.Popen's interface that tests use."""

    def __init__(self, warm: Warm, pid: int, output: Path) -> None:
        self.warm, self.pid, self.output = warm, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.warm.ask({"poll": self.pid})
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Both its outputs, once it has ended. subprocess.TimeoutExpired: it has not."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > limit:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.output.read_text(), None


class Warm:
    """The process with the imports; it lives as long as this object's owner."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.count = 0
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, request: Mapping[str, Any]) -> int | None:
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer: int | None = json.loads(self.server.stdout.readline())
        return answer

    def start(self, program: str, *arguments: str, env: Mapping[str, str]) -> Forked:
        """`program`: a script, or a module's name, run as ``python -m`` would run it; in a session of its own."""
        self.count += 1
        output = Path(self.folder.name) / f"{self.count}.txt"
        pid = self.ask({"argv": [program, *arguments], "env": dict(env), "output": str(output)})
        assert pid is not None
        return Forked(self, pid, output)

    def close(self) -> None:
        self.server.communicate()
        self.folder.cleanup()


# ---- the process with the imports --------------------------------------------------------------------------


def serve() -> None:
    """Answer requests, a line each, until the input ends; in a fork: become the program that was asked for."""
    from dit_booth.run import collector_at_rest, load_modules

    with collector_at_rest():  # its forks share these pages
        import dit_booth.components
        import dit_booth.config.parse  # noqa: F401

        load_modules()
    os.fsync = sync_nothing
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer: int | None = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                become(**request)
                return
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def become(argv: list[str], env: dict[str, str], output: str) -> None:
    """Run the program as the interpreter would; it ends as the interpreter ends."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (file, 1), (file, 2)):
        os.dup2(old, new)
    os.environ.clear()
    os.environ.update(env)
    added = [
        folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder and folder not in sys.path
    ]
    sys.path[1:1] = added
    sys.argv = argv
    if argv[0].endswith(".py"):
        sys.path[0] = str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")
    else:
        sys.path[0] = str(Path.cwd())
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve()
