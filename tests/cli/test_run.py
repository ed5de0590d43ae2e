"""The program, launched as its users launch it: what a run writes, on both backbones, on one rank and on two."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dit_booth.config.parse import parse
from dit_booth.data.video import probe
from dit_booth.evaluation.folder import VideoFolder
from dit_booth.evaluation.scores import read_scores

pytestmark = pytest.mark.slow
LAUNCHED = ["--train.checkpoint-every", "1", "--sample.videos", "3"]  # two ranks share three videos
EMBEDDED = ["--weights", "embedded", "--clip.pretrained", "embedded"]  # a new DiT's output would be zero
ONE_STEP = ["--stages.coarse.steps", "1"]  # of which no checkpoint is left
FAST = ["--stages.coarse.lr", "0.01", "--stages.fine.lr", "0.01"]  # two steps must show in the videos


@dataclass(frozen=True)
class Run:
    """A finished run, and how it was started."""

    folder: Path
    arguments: list[str]
    output: str

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(program, tiny, tmp_path_factory) -> Run:
    """By DeepSpeed's launcher, on two ranks, as ``ds_config.json`` has it (ZeRO stage 2)."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    arguments = [*tiny, *EMBEDDED, *LAUNCHED, *FAST, "--out", str(folder)]
    ended = program.run(*arguments, ranks=2)
    assert ended.code == 0, ended.output
    return Run(folder, arguments, ended.output)


@pytest.fixture(scope="module")
def zero3(tmp_path_factory) -> list[str]:
    """Arguments for ZeRO stage 3, with partitions as small as the model is; none is kept for its next use."""
    file = tmp_path_factory.mktemp("zero3") / "zero3.json"
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    file.write_text(json.dumps({"zero_optimization": settings}))
    return ["--ds-config", str(file)]


def test_there_are_two_ranks_and_the_first_one_speaks(launched: Run):
    assert "token_replacement+kv_concat on dit, ranks: 2, stages: coarse fine" in launched.output
    assert launched.output.count("first step of coarse after") == 1
    assert "Traceback" not in launched.output


def test_every_step_is_one_line_with_its_numbers(launched: Run):
    steps = [line for line in launched.lines() if "step" in line]
    assert [(s["stage"], s["step"]) for s in steps] == [
        ("coarse", 1), ("coarse", 2), ("fine", 1), ("fine", 2)
    ]  # fmt: skip
    assert all(math.isfinite(s[name]) for s in steps for name in ("loss", "aux_loss", "lr", "grad_norm"))
    assert all(s["loss"] > 0 and s["seconds"] > 0 for s in steps)
    # The rate that the step was made with: the stage warms up over 20 steps to 0.01, and its cosine is half-way down.
    assert [s["lr"] for s in steps[:2]] == pytest.approx([0.01 / 20, 0.02 / 20 / 2])


def test_tensorboard_reads_scalars_and_videos(launched: Run):
    events = EventAccumulator(str(launched.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("coarse/loss")] == [1, 2]
    assert [event.value for event in events.Scalars("fine/loss")] == pytest.approx(
        [line["loss"] for line in launched.lines() if line.get("stage") == "fine"]
    )
    assert events.Images("samples/000-seed0")[0].encoded_image_string.startswith(b"GIF89a")


def test_samples_are_videos_with_metrics_and_a_contact_sheet(launched: Run):
    samples = launched.folder / "samples"
    assert sorted(path.name for path in samples.glob("*.mp4")) == [f"00{i}-seed0.mp4" for i in range(3)]
    for path in samples.glob("*.mp4"):
        info = probe(path)
        assert (info.frames, info.height, info.width, info.fps) == (3, 12, 12, 8)
    scores = read_scores(samples / "scores.jsonl")
    own = [score for score in scores if score.metric == "psnr" and not score.control]
    assert len({score.prompt for score in own}) == len(own) == 3
    last = launched.lines()[-1]
    assert last["samples"]["psnr"]["n"] == 3
    assert last["samples"]["psnr"]["mean"] == pytest.approx(sum(s.mean for s in own) / 3, rel=1e-4)
    # The ground truth is scored in the same way.
    assert last["controls"].keys() == {"truth"}
    assert last["controls"]["truth"]["palette"]["mean"] < last["samples"]["palette"]["mean"]
    rows = VideoFolder(samples / "videos.csv")
    assert [rows[i].prompt for i in range(3)] == [score.prompt for score in own]
    with Image.open(samples / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 36


def test_strategy_and_backbone_are_files_of_their_own(launched: Run):
    strategy = load_file(launched.folder / "strategy.safetensors")
    backbone = load_file(launched.folder / "weights.safetensors")
    assert {name.split(".")[0] for name in strategy} == {"token_replacement", "kv_concat"}
    assert {name.split(".")[0] for name in backbone} == {"backbone", "text"}
    assert all(bool(torch.isfinite(value).all()) for value in strategy.values())
    with safe_open(launched.folder / "strategy.safetensors", "pt") as file:
        assert file.metadata()["strategy"] == "token_replacement+kv_concat"


def test_each_stage_leaves_its_weights_and_a_current_checkpoint(launched: Run):
    for stage, part in (("0_coarse", "token_replacement"), ("1_fine", "kv_concat")):
        folder = launched.folder / "checkpoints" / stage
        assert {name.split(".")[1] for name in load_file(folder / "weights.safetensors")} == {part}
        latest = json.loads((folder / "latest.json").read_text())
        assert latest == {"tag": "step1", "ranks": 2, "zero": 2}
        assert json.loads((folder / "cost.json").read_text())["ranks"] == 2
        assert [path.name for path in folder.glob("step*")] == ["step1"]


def test_nothing_half_written_is_left(launched: Run):
    assert not list(launched.folder.rglob("*.part"))
    assert (launched.folder / "finished").is_file()


def test_run_yaml_says_how_to_repeat_it(launched: Run):
    file = launched.folder / "run.yaml"
    config = parse(["--config", str(file)])
    assert config.folder() == str(launched.folder)
    assert config.as_dict() == yaml.safe_load(file.read_text())
    assert (config.data.size, config.sample.videos, config.train.clip) == (12, 3, 1.0)


def test_it_says_where_everything_is(launched: Run):
    for name in ("", "samples/contact_sheet.png", "samples", "strategy.safetensors", "tensorboard"):
        assert str(launched.folder / name) in launched.output


def test_the_same_command_again_does_nothing_and_says_so(launched: Run, program):
    before = {path: path.stat().st_mtime_ns for path in launched.folder.rglob("*")}
    ended = program.run(*launched.arguments, "--data.workers", "1")  # what changes no result may differ
    assert ended.code == 0
    assert "finished, nothing to do" in ended.output
    assert str(launched.folder / "samples" / "contact_sheet.png") in ended.output
    assert {path: path.stat().st_mtime_ns for path in launched.folder.rglob("*")} == before


def test_a_finished_run_samples_again_and_from_an_image_of_ones_own(launched: Run, program, tmp_path: Path):
    picture = np.full((20, 16, 3), 255, np.uint8)
    picture[5:15, 4:12] = (200, 30, 30)
    Image.fromarray(picture).save(tmp_path / "mine.png")
    command = ["experiments/sample.py", str(launched.folder)]
    own = ["--image", str(tmp_path / "mine.png"), "--caption", "a star is spinning", "--subject", "star"]
    again = program.python(*command, "--references", "own", "none")
    assert again.code == 0, again.output
    first, second = (
        read_scores(launched.folder / name / "scores.jsonl")
        for name in ("samples", "samples-dev-own-none-seed0")
    )
    psnr = [
        {s.prompt: s.mean for s in scores if s.metric == "psnr" and not s.control}
        for scores in (first, second)
    ]
    assert (
        psnr[0] == pytest.approx(psnr[1], abs=1e-4) and len(psnr[0]) == 3
    )  # the saved weights are the run's
    assert {s.control for s in first} == {"", "truth"} and {s.control for s in second} == {
        "",
        "none",
        "truth",
    }
    mine = program.python(*command, *own)
    assert mine.code == 0, mine.output
    assert probe(mine.output.strip().splitlines()[-1]).frames == 3
    wrong = program.python(*command, *own[:4], "--subject", "moon")
    assert wrong.code == 1
    assert "moon" in wrong.output.splitlines()[-1]


def test_the_unet_by_plain_python(program, tiny, tiny_unet, tmp_path: Path):
    ended = program.run(*tiny, *tiny_unet, "--sample.videos", "1", "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.output
    assert "on unet, ranks: 1," in ended.output
    trained = load_file(tmp_path / "run" / "strategy.safetensors")
    assert "kv_concat.taps.mid_block.attentions.0.transformer_blocks.0.attn1.to_k_new.weight" in trained
    assert probe(tmp_path / "run" / "samples" / "000-seed0.mp4").frames == 3


def test_zero_stage_3_on_two_ranks(program, tiny, tiny_unet, zero3, tmp_path: Path):
    """Parameters are partitioned while training, and whole in what is written."""
    flags = ["--train.checkpoint-every", "1", "--sampler.steps", "1", "--out", str(tmp_path)]
    for ended in program.two_ranks(*tiny, *tiny_unet, *zero3, *ONE_STEP, *flags):
        assert ended.code == 0, ended.output
    assert json.loads((tmp_path / "checkpoints/1_fine/latest.json").read_text())["zero"] == 3
    width = 8  # of the first level
    trained = load_file(tmp_path / "strategy.safetensors")
    first = trained["kv_concat.taps.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k_new.weight"]
    assert first.shape == (width, width)
    assert all(bool(torch.isfinite(value).all()) for value in trained.values())
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2


def test_zero_stage_3_on_the_dit(program, tiny, zero3, tmp_path: Path):
    """Its pooled text goes through a parameter that the text encoder itself uses, in the backward pass too."""
    flags = [*ONE_STEP, "--stages.fine.steps", "1", "--sample.videos", "0", "--out", str(tmp_path)]
    ended = program.run(*tiny, *zero3, *flags)
    assert ended.code == 0, ended.output
    trained = load_file(tmp_path / "strategy.safetensors")
    assert trained["kv_concat.taps.blocks.0.attn1.to_k_new.weight"].shape == (128, 128)
