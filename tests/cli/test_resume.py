"""A run that is cut off continues with the same command, and ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
STEPS = 16
LONGER = ["--stages.coarse.steps", str(STEPS), "--sample.videos", "1"]
WORKER = ["--data.workers", "1"]  # a reader process gets the same signals; it changes no batch


def all_steps(coarse: int) -> list[tuple[str, int]]:
    return [("coarse", step) for step in range(1, coarse + 1)] + [("fine", 1), ("fine", 2)]


def latest(folder: Path) -> int:
    """The step of the coarse stage's current checkpoint."""
    tag = json.loads((folder / "checkpoints" / "0_coarse" / "latest.json").read_text())["tag"]
    return int(tag.removeprefix("step"))


def numbers(folder: Path) -> list[dict[str, float]]:
    """The lines of every step without what may differ: the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def lines(folder: Path) -> list[str]:
    """The lines of every step, with its seconds: no two computations of a step have the same."""
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def unbroken(program, tiny, train_all, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    ended = program.run(*tiny, *train_all, *LONGER, "--out", str(folder))
    assert ended.code == 0, ended.output
    return folder


def test_interrupted_then_killed_it_still_ends_with_the_same_weights(
    program, tiny, train_all, unbroken: Path, steps_of, tmp_path: Path
):
    folder = tmp_path / "run"
    command = [*tiny, *train_all, *LONGER, *WORKER, "--train.checkpoint-every", "2", "--out", str(folder)]

    ended = program.cut(*command, folder=folder, steps=3, number=signal.SIGINT)
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output
    done = steps_of(folder)[-1][1]
    assert 3 <= done < STEPS
    assert latest(folder) == done  # of this moment, not the last periodic one
    assert f"stopped at step {done} of stage coarse; the same command resumes there" in ended.output
    assert not (folder / "finished").exists()
    first = lines(folder)
    assert "goes on after" not in ended.output

    ended = program.cut(*command, folder=folder, steps=done + 3, number=signal.SIGKILL)
    assert ended.code == -signal.SIGKILL, ended.output
    assert f"stage coarse goes on after step {done}\n" in ended.output
    assert lines(folder)[:done] == first, "no step is computed again"
    killed = steps_of(folder)[-1][1]
    assert done + 3 <= killed <= STEPS
    assert latest(folder) % 2 == 0 or latest(folder) == done
    assert killed - 3 <= latest(folder) <= killed
    kept, second = latest(folder), lines(folder)

    ended = program.run(*command)
    assert ended.code == 0, ended.output
    assert f"stage coarse goes on after step {kept}\n" in ended.output
    assert lines(folder)[:kept] == second[:kept]
    assert steps_of(folder) == all_steps(STEPS)  # each once, in order
    assert numbers(folder) == numbers(unbroken)
    for name in ("weights.safetensors", "strategy.safetensors", "checkpoints/0_coarse/weights.safetensors"):
        ours, theirs = load_file(folder / name), load_file(unbroken / name)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_interrupted_under_the_launcher_with_two_ranks(program, tiny, steps_of, tmp_path: Path):
    folder, steps = tmp_path / "run", 9
    # More micro-batches than a reader keeps ready: the step that meets the signal still needs new ones.
    command = [*tiny, *LONGER, *WORKER, "--train.batch-size", "8", "--train.accumulation", "4"]
    command += ["--stages.coarse.steps", str(steps), "--out", str(folder)]

    ended = program.cut(*command, folder=folder, steps=3, number=signal.SIGINT, ranks=2)
    assert ended.code != 0
    assert not re.search(r'File ".*(/run|trainer|dataloader)\.py"', ended.output), (
        ended.output
    )  # the launcher has one
    done = steps_of(folder)[-1][1]
    assert latest(folder) == done < steps
    assert ended.output.count(f"stopped at step {done} of stage coarse") == 1
    first = lines(folder)

    for rank, ended in enumerate(program.two_ranks(*command)):
        assert ended.code == 0, ended.output
        assert ended.output.count(f"stage coarse goes on after step {done}\n") == (rank == 0)
    assert lines(folder)[:done] == first
    assert steps_of(folder) == all_steps(steps)
    assert (folder / "finished").is_file()
