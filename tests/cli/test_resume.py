"""A run that is cut off continues with the same command, and ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dit_booth.data.video import write_video

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


def write_clips(root: Path) -> list[str]:
    """Write five videos of three shapes; return the flags to train on them in buckets."""
    root.mkdir()
    for number, (frames, height, width) in enumerate([(3, 12, 24)] * 2 + [(3, 12, 12)] * 2 + [(2, 12, 24)]):
        video = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_video(root / f"{number}.mp4", video, fps=8)
        (root / f"{number}.txt").write_text(f"a box of number {number}\nbox\n")
    flags = ["--data.kind", "triplets", "--data.triplets.root", str(root), "--data.triplets.format", "folder"]
    return [*flags, "--data.triplets.stride", "1", "--data.buckets", "12x12", "12x24", "12x24x2"]


def test_interrupted_then_killed_in_buckets_it_still_ends_with_the_same_weights(
    program, tiny, train_all, steps_of, tmp_path: Path
):
    data = write_clips(tmp_path / "data")
    folder, unbroken = tmp_path / "run", tmp_path / "unbroken"
    ended = program.run(*tiny, *train_all, *LONGER, *data, "--out", str(unbroken))
    assert ended.code == 0, ended.output
    command = [
        *tiny,
        *train_all,
        *LONGER,
        *data,
        *WORKER,
        "--train.checkpoint-every",
        "2",
        "--out",
        str(folder),
    ]

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
