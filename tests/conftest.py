"""What the tests share: arguments of a tiny run, and the real program, in this process, forked or launched."""

from __future__ import annotations

import csv
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from warm import RANKS, Forked, Warm, environment, sync_nothing

gc.disable()  # the collector would go over what the tests' imports make, again and again: a third of their time
ROOT = Path(__file__).parents[1]
TINY = [
    "--strategy",
    "token_replacement+kv_concat",
    "--weights",
    "none",
    "--clip.pretrained",
    "none",
    "--data.size",
    "12",
    "--data.frames",
    "3",
    "--stages.coarse.steps",
    "2",
    "--stages.fine.steps",
    "2",
    "--train.batch-size",
    "2",
    "--sample.videos",
    "2",
    "--sampler.steps",
    "2",
]
# Trains every weight: a new DiT's output layer is zero, so strategies alone would get no gradient.
TRAIN_ALL = ["--stages.coarse.train", "backbone.*", "strategy.*", "--stages.fine.train", "*"]
TINY_UNET = [
    "--backbone",
    "unet",
    "--unet.channels",
    "8",
    "16",
    "--unet.norm-groups",
    "4",
    "--unet.heads",
    "1",
    "--unet.layers-per-block",
    "1",
    "--unet.down-attention",
    "True",
    "True",
]
TIMEOUT = 600.0
# Tests of two ranks, which need both cores, first and beside those that mostly wait; then long files, so that short
# ones even out the end.
FIRST = (
    "contracts/test_zero_contracts.py",
    "unit/test_sweep_launch.py",
    "cli/test_zero.py",
    "unit/test_sweep_slots.py",
    "cli/test_sweep.py",
    "contracts/test_strategies.py",
    "cli/test_resume.py",
    "cli/test_run.py",
    "golden/test_videobooth_unet.py",
    "golden/test_golden_files.py",
    "cli/test_write_a_strategy.py",
    "unit/test_attention_compile.py",
    "unit/test_shipped_sweeps.py",
    "golden/test_check.py",
    "faults/test_run_faults.py",
)
RUN = "experiments/run.py"


@dataclass(frozen=True)
class Ended:
    """An ended run of the program."""

    code: int
    output: str

    def errors(self) -> list[str]:
        """The lines in which it says what is wrong."""
        return [line for line in self.output.splitlines() if line.startswith("error")]


class Program:
    """``experiments/run.py`` in process groups of their own: forked from a warm process, or by DeepSpeed's launcher."""

    def __init__(self) -> None:
        self.warm = Warm()

    def start(self, *arguments: str, ranks: int = 0) -> Forked | subprocess.Popen[str]:
        """One process, or with `ranks` as many as the launcher starts."""
        if not ranks:
            return self.warm.start(RUN, *arguments, env=environment())
        launcher = Path(sys.executable).parent / "deepspeed"
        env = environment(LOCAL_SIZE=str(ranks))  # on the CPU the launcher starts so many ranks
        return subprocess.Popen(
            [str(launcher), "--master_port", str(free_port()), RUN, *arguments],
            cwd=ROOT,
            env={**env, "PATH": f"{launcher.parent}{os.pathsep}{env['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: Forked | subprocess.Popen[str], number: int = 0) -> Ended:
        """Wait until it ends, after signal `number` to the whole group, as Ctrl-C sends it."""
        try:
            if number:
                os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=TIMEOUT)
            assert process.returncode is not None
            return Ended(process.returncode, output)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def run(self, *arguments: str, ranks: int = 0) -> Ended:
        return self.end(self.start(*arguments, ranks=ranks))

    def cut(self, *arguments: str, folder: Path, steps: int, number: int, ranks: int = 0) -> Ended:
        """Start, wait until ``metrics.jsonl`` has `steps` lines, and signal."""
        process = self.start(*arguments, ranks=ranks)
        limit = time.monotonic() + TIMEOUT
        while len(metrics(folder)) < steps and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        return self.end(process, number if process.poll() is None else 0)

    def python(self, program: str, *arguments: str, packages: Path | None = None) -> Ended:
        """A script, or a module by its name, as one process; `packages`: a folder of further installed ones."""
        env = environment()
        if packages:
            env["PYTHONPATH"] += f"{os.pathsep}{packages}"
        return self.end(self.warm.start(program, *arguments, env=env))

    def two_ranks(self, *arguments: str, program: str = RUN) -> tuple[Ended, Ended]:
        """What a launcher would start, without one: how each rank ends by itself."""
        port = str(free_port())
        started = []
        for rank in "01":
            env = environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE="2",
                LOCAL_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            started.append(self.warm.start(program, *arguments, env=env))
        try:
            first, second = map(self.end, started)
        finally:
            for process in started:  # the other one, if the first did not end
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return first, second


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` that are whole."""
    file = folder / "metrics.jsonl"
    text = file.read_text() if file.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    place = {tests / name: i for i, name in enumerate(FIRST)}
    assert all(file.is_file() for file in place)
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(10_000)  # a 20th of the tests' time at 700, and what they leave behind is small
    gc.enable()


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments of a run of two stages with two steps each."""
    return list(TINY)


@pytest.fixture(scope="session")
def train_all() -> list[str]:
    """Further arguments: both stages train every weight."""
    return list(TRAIN_ALL)


@pytest.fixture(scope="session")
def tiny_unet() -> list[str]:
    """Further arguments: the U-Net, tiny."""
    return list(TINY_UNET)


@pytest.fixture(scope="session")
def program() -> Iterator[Program]:
    program = Program()
    yield program
    program.warm.close()


@pytest.fixture(scope="session")
def steps_of() -> Callable[[Path], list[tuple[str, int]]]:
    """Folder -> (stage, step) of each line that a step wrote."""
    return lambda folder: [(line["stage"], line["step"]) for line in metrics(folder) if "step" in line]


@pytest.fixture(scope="session")
def write_triplets() -> Callable[..., Path]:
    """write_triplets(root, captions, label): a data set in VideoBooth's format, a white square over noise.

    `label` is its word in the masks; one example (``clip0``, ``clip1``, ...) for each caption.
    """
    import numpy as np
    import torch
    from PIL import Image

    from dit_booth.data.video import write_video

    def write(root: Path, captions: Sequence[str], label: str) -> Path:
        for number in range(len(captions)):
            video = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * 2 - 1
            video[:, :, 4:12, 4:12] = 1.0
            write_video(root / "videos" / "page" / f"clip{number}.mp4", video, fps=8)
            masks = root / "masks" / f"clip{number}"
            masks.mkdir(parents=True)
            mask = np.zeros((16, 16), np.uint8)
            mask[4:12, 4:12] = 255
            Image.fromarray(mask).save(masks / "mask_1.png")
            entry = {"value": 1, "label": label, "logit": 0.9, "box": [4.0, 4.0, 12.0, 12.0]}
            (masks / "mask.json").write_text(json.dumps([{"value": 0, "label": "background"}, entry]))
        with (root / "all.csv").open("w", newline="") as file:
            rows = [(f"clip{number}", "page", caption) for number, caption in enumerate(captions)]
            csv.writer(file).writerows([("videoid", "page_dir", "name"), *rows])
        return root

    return write


@pytest.fixture
def in_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> Iterator[Any]:
    """The program's ``main`` (or another command's) in this process, which saves the seconds of a launch."""
    import torch

    from dit_booth.run import main

    threads = torch.get_num_threads()
    for name in RANKS:  # what `start` sets is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "fsync", sync_nothing)
    monkeypatch.chdir(ROOT)

    def run(*arguments: str, main: Callable[[list[str]], int] = main) -> Ended:
        capfd.readouterr()
        caplog.clear()
        code = main(list(arguments))
        return Ended(code, "".join(capfd.readouterr()) + caplog.text)  # pytest takes the log's lines

    yield run
    torch.set_num_threads(threads)
    gc.unfreeze()
