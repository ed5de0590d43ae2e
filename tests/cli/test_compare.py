"""``dit-booth compare`` on tiny videos: the same budget for all, a page, resuming, and bad input."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dit_booth.commands.compare import main
from dit_booth.comparison import work
from dit_booth.evaluation.folder import read_rows
from dit_booth.evaluation.scores import read_scores
from dit_booth.files import Lock

pytestmark = pytest.mark.slow
METHODS = ("videobooth", "tune_a_video", "none")
TINY = ["--set", "data.size=12", "data.frames=2", "sampler.steps=2", "train.batch_size=2"]
BUDGET = 1.4e9


def command(out: Path, *more: str) -> list[str]:
    arguments = ["--budget", f"{BUDGET}FLOP", "--subjects", "2", "--amortise", "2", "--out", str(out)]
    return [*arguments, "--methods", *METHODS, *more, *TINY]


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.glob(pattern))}


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Ctrl-C while the subject after `count` others is sampled; the returned function takes it back."""
    real, seen = work.sample_subject, []

    def sample(*arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) > count:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(work, "sample_subject", sample)
    return lambda: monkeypatch.setattr(work, "sample_subject", real)


def test_an_interrupted_comparison_goes_on_and_ends_in_a_page(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "compared"
    again = interrupt_after(3, monkeypatch)
    ended = in_process(*command(out), main=main)
    assert ended.code == 130 and "the same command resumes" in ended.output
    markers, stages = stamps(out, "points/*/subjects/*.json"), stamps(out, "stages/*/weights.safetensors")
    assert len(markers) == 3 and len(stages) == 2 + 2
    again()
    with held_elsewhere(out / "points" / "tune_a_video-s0", "001.lock"):
        assert in_process(*command(out), main=main).code == 0
    added = set(stamps(out, "points/*/subjects/*.json")) - set(markers)
    assert {Path(file).parts[-3] for file in added} == {"none-s0"}, (
        "the other process's subject is left to it"
    )
    ended = in_process(*command(out), main=main)
    assert ended.code == 0, ended.output
    assert stamps(out, "points/*/subjects/*.json").items() >= markers.items()
    assert stamps(out, "stages/*/weights.safetensors").items() >= stages.items(), "trained once"
    check_points(out)
    check_page(out)
    done = stamps(out, "points/*/subjects/*.json")
    assert in_process(*command(out), main=main).code == 0
    assert stamps(out, "points/*/subjects/*.json") == done, "nothing is left to do"
    other = in_process(*command(out), "--budget", "1PFLOP", main=main)
    assert other.code == 1
    assert f"--budget is '1PFLOP', and {out} holds a comparison at '{BUDGET}FLOP'" in other.errors()[0]


@contextlib.contextmanager
def held_elsewhere(folder: Path, name: str) -> Iterator[None]:
    """Let a process hold a lock: those of this process would not stop it."""
    pipe, child = os.pipe(), os.fork()
    if child == 0:
        os.write(pipe[1], b"1" if Lock(folder, name).take() else b"0")
        signal.pause()
    assert os.read(pipe[0], 1) == b"1"
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def check_points(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == list(METHODS)
    assert [row["tuning_free"] for row in rows] == [1, 0, 1]
    assert all(row["status"] == "finished" and 0 < row["subject_flops"] <= BUDGET for row in rows)
    assert [row["shared_flops"] > 0 for row in rows] == [True, False, False]
    stored = dict(zip(METHODS, (row["subject_bytes"] for row in rows), strict=True))
    assert stored["videobooth"] == stored["none"] == 0
    assert stored["tune_a_video"] == pytest.approx(4 * 413_120, rel=0.02)  # its parameters in float32
    for row in rows:
        samples = out / row["run"] / "samples"
        videos, scores = read_rows(samples / "videos.csv"), read_scores(samples / "scores.jsonl")
        own = [video for video in videos if not video.control]
        assert [video.video for video in own] == ["000-seed0.mp4", "001-seed0.mp4"]
        assert [video.image for video in own] == ["image/000.png", "image/001.png"]
        assert all(
            (samples / video.video).is_file() and (samples / video.truth).is_file() for video in videos
        )
        floors = {"shuffled", "none"} if row["label"] == "videobooth" else set()
        assert {score.control for score in scores} == {"", "truth"} | floors
        palette = [score for score in scores if score.metric == "palette" and not score.control]
        assert [score.prompt for score in palette] == [f"toyworld/0/test/{i}" for i in range(2)]


def check_page(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert "FLOPs" in page and "Tuning-free" in page
    with (out / "report.csv").open() as file:
        table = {row["variant"]: row for row in csv.DictReader(file)}
    assert {*METHODS} <= table.keys()
    assert table["videobooth"]["baseline"] == "1" and float(table["tune_a_video"]["subject_bytes"]) > 1e6
    assert "dit-booth compare --budget" in page


def test_a_budget_too_small_is_one_line_before_any_training(in_process: Any, tmp_path: Path):
    out = tmp_path / "compared"
    small = ["--budget", "0.4GFLOP", "--subjects", "1", "--methods", "textual_inversion", "--out", str(out)]
    ended = in_process(*small, *TINY, main=main)
    assert ended.code == 1
    (line,) = ended.errors()
    assert "too small for textual_inversion, which needs " in line
    assert not (out / "stages").exists() and not (out / "budget.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "60 parsecs"], "write FLOPs or seconds per subject"),
        (["--methods", "dreambooht"], "--methods names 'dreambooht'; nearest: dreambooth"),
        (["--subjects", "0"], "subjects is 0"),
        (["--seeds", "1", "1"], "seeds is (1, 1); name at least one, each once"),
        (["--set", "sampler.stepps=3"], "setting 'sampler.stepps' is unknown; nearest: steps"),
    ],
)
def test_bad_input_is_one_line(in_process: Any, tmp_path: Path, words: list[str], said: str):
    ended = in_process("--out", str(tmp_path / "compared"), *words, main=main)
    assert ended.code == 1
    (line,) = ended.errors()
    assert said in line
