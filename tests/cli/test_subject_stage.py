"""Stage `subject` in the real program: what changes, resuming, two ranks, and a baseline by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit_booth.components import build
from dit_booth.config import RunConfig

pytestmark = pytest.mark.slow
ASSETS = Path(__file__).parents[2] / "dit_booth" / "assets"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    pixels = np.full((24, 24, 3), 255, np.uint8)
    pixels[6:18, 6:18] = (200, 30, 30)
    file = tmp_path_factory.mktemp("image") / "star.png"
    Image.fromarray(pixels).save(file)
    return str(file)


@pytest.fixture(scope="module")
def arguments(image: str) -> list[str]:
    """A run of four steps for one subject, from the embedded base at a tiny size, without videos."""
    return [
        *("--schedule", "subject", "--subject.image", image, "--subject.word", "star"),
        *("--data.size", "12", "--data.frames", "2", "--sampler.steps", "2", "--sample.videos", "0"),
        *("--stages.subject.steps", "4", "--stages.subject.warmup", "0", "--stages.subject.lr", "0.01"),
        *("--train.batch-size", "2", "--train.checkpoint-every", "2", "--train.ema", "0"),
    ]


def test_only_the_word_changes_and_weight_decay_touches_nothing_else(
    in_process: Any, arguments: list[str], tmp_path: Path
):
    strategy = ["--strategy", "textual_inversion", "--train.weight-decay", "0.5"]
    ended = in_process(*strategy, *arguments, "--out", str(tmp_path / "ti"))
    assert ended.code == 0, ended.output
    trained = load_file(tmp_path / "ti" / "checkpoints" / "0_subject" / "weights.safetensors")
    ((name, offset),) = trained.items()
    assert name.startswith("strategy.textual_inversion.") and offset.any()
    ended_with = load_file(tmp_path / "ti" / "weights.safetensors")
    start = build(RunConfig.create(tmp_path / "ti" / "run.yaml")).model.state_dict()
    assert ended_with.keys() == {key for key in start if not key.startswith("strategy.")}
    assert all(torch.equal(value, start[key]) for key, value in ended_with.items())


DREAMBOOTH = [
    *("--strategy", "none", "--subject.token", "sks", "--subject.prior", "3"),
    *("--stages.subject.train", "backbone.blocks.0.attn1.*"),
]


def test_a_resumed_stage_equals_an_unbroken_one(in_process: Any, arguments: list[str], tmp_path: Path):
    """The state after two of four steps is that of a run that was stopped there."""
    command = [*DREAMBOOTH, *arguments, "--out", str(tmp_path / "run")]
    ended = in_process(*command)
    assert ended.code == 0, ended.output
    stage = tmp_path / "run" / "checkpoints" / "0_subject"
    whole = load_file(stage / "weights.safetensors")
    assert (stage / "step2").is_dir()
    for marker in (stage / "weights.safetensors", tmp_path / "run" / "finished"):
        marker.unlink()
    (images,) = (stage / "prior").iterdir()
    sampled = images.stat().st_mtime_ns
    again = in_process(*command)
    assert again.code == 0 and "goes on after step 2" in again.output, again.output
    assert images.stat().st_mtime_ns == sampled, "the class images are kept"
    resumed = load_file(stage / "weights.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_ranks_share_the_class_images_and_train_alike(
    in_process: Any, program: Any, arguments: list[str], tmp_path: Path
):
    alone = in_process(*DREAMBOOTH, *arguments, "--out", str(tmp_path / "one"))
    assert alone.code == 0, alone.output
    both = [*DREAMBOOTH, *arguments, "--out", str(tmp_path / "two")]
    for ended in program.two_ranks(*both):
        assert ended.code == 0, ended.output
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "0_subject" / "weights.safetensors")
        for name in ("one", "two")
    )
    start = load_file(ASSETS / "dit.safetensors")
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.abs().mean() > 1e-3, "the control: four steps move the weights"
    assert apart.abs().mean() < 1e-2 * moved.abs().mean()


def test_a_white_image_is_one_line_and_leaves_no_weights(
    in_process: Any, arguments: list[str], tmp_path: Path
):
    Image.fromarray(np.full((9, 9, 3), 255, np.uint8)).save(tmp_path / "white.png")
    white = ["--subject.image", str(tmp_path / "white.png")]
    ended = in_process(
        *DREAMBOOTH, *arguments, *white, "--subject.prior", "0", "--out", str(tmp_path / "run")
    )
    assert ended.code == 1
    (line,) = ended.errors()
    assert "white.png is all white" in line
    assert not list(tmp_path.rglob("*.safetensors"))
