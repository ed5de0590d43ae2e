"""A tiny real sweep for tests: its description, how to run and kill it, and what its folder must never show."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from warm import environment

from dit_booth.files import read_lines
from dit_booth.study.rows import MEASURED

ROOT = Path(__file__).parents[1]
TINY = {
    "extends": str(ROOT / "experiments/configs/demo.yaml"),
    "weights": "none",
    "clip": {"pretrained": "none"},
    "data": {"size": 12, "frames": 3},
    "stages": {"coarse": {"steps": 6, "train": ["backbone.*", "strategy.*"]}, "fine": {"steps": 4}},
    "train": {"batch_size": 2, "checkpoint_every": 2},
    "sample": {"videos": 2},
    "sampler": {"steps": 2},
}
STUDY = {
    "base": "base.yaml",
    "grid": {"kv_concat.update": ["first_frame_value", "direct"]},
    "seeds": [0],
    "baseline": {"kv_concat.update": "first_frame_value"},
    "launcher": "python",
}
TIMEOUT = 900.0


def describe(folder: Path, base: dict[str, Any] | None = None, **study: Any) -> Path:
    """Write a description with its base, each with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump({**TINY, **(base or {})}))
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **study}, sort_keys=False))
    return file


class Sweep:
    """``experiments/sweep.py`` on a folder; every process of it is known by a mark in its environment."""

    def __init__(self, file: Path, out: Path) -> None:
        self.file, self.out = file, out
        self.mark = f"DIT_BOOTH_TEST={uuid.uuid4().hex}"

    def start(self, *more: str) -> subprocess.Popen[str]:
        name, _, value = self.mark.partition("=")
        return subprocess.Popen(
            [sys.executable, "experiments/sweep.py", str(self.file), "--out", str(self.out), *more],
            cwd=ROOT,
            env=environment(**{name: value}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *more: str) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(*more)
        try:
            output, _ = process.communicate(timeout=TIMEOUT)
        finally:
            self.kill(lambda command: True)
        return process.returncode, output

    def processes(self) -> dict[int, str]:
        """Command lines of this sweep's living processes, its points' included, by number."""
        found = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z" and command:
                        found[int(folder.name)] = command
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def left(self) -> dict[int, str]:
        """Processes that do not end by themselves: one that outlived its sweep may just be on its way out."""
        limit = time.monotonic() + 60
        while self.processes() and time.monotonic() < limit:
            time.sleep(0.2)
        return self.processes()

    def kill(self, chosen: Callable[[str], bool]) -> list[int]:
        """SIGKILL to every process whose command line is `chosen`."""
        numbers = [number for number, command in self.processes().items() if chosen(command)]
        for number in numbers:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return numbers

    def rows(self) -> list[dict[str, Any]]:
        return read_lines(self.out / "sweep.jsonl")

    def table(self) -> list[dict[str, Any]]:
        """The rows without what is measured anew each time."""
        return [without_measures(row) for row in self.rows()]

    def stage_steps(self) -> dict[str, list[int]]:
        """The steps in every stage's log."""
        return {
            folder.name: [line["step"] for line in read_lines(folder / "metrics.jsonl")]
            for folder in sorted(self.out.glob("stages/*"))
        }


def is_rank(command: str) -> bool:
    """A process that trains, not a launcher that names it."""
    return "dit_booth.run" in command and "deepspeed" not in command


def without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_measures(v) for k, v in value.items() if k not in MEASURED}
    return [without_measures(v) for v in value] if isinstance(value, list) else value


class Watch(threading.Thread):
    """Looks at a sweep's folder all the time: what is finished stays as it is, and what is read is whole."""

    def __init__(self, out: Path) -> None:
        super().__init__(daemon=True)
        self.out, self.finished, self.wrong, self.ended = (
            out,
            dict[Path, tuple[int, int]](),
            list[str](),
            False,
        )

    def run(self) -> None:
        while not self.ended:
            self.look()
            time.sleep(0.02)

    def look(self) -> None:
        for file in [*self.out.glob("stages/*/weights.safetensors"), *self.out.glob("points/*/finished")]:
            status = file.stat()
            now = (status.st_ino, status.st_mtime_ns)
            if self.finished.setdefault(file, now) != now:
                self.wrong.append(f"{file} was written again")
        self.wrong += [f"{file} is gone" for file in self.finished if not file.is_file()]
        rows = self.out / "sweep.jsonl"
        text = rows.read_text() if rows.is_file() else ""
        try:
            assert not text or text.endswith("\n")
            [json.loads(line) for line in text.splitlines()]
        except (AssertionError, json.JSONDecodeError) as error:
            self.wrong.append(f"sweep.jsonl is not whole: {error}")

    def end(self) -> list[str]:
        """What was wrong."""
        self.ended = True
        self.join()
        self.look()
        return self.wrong
