"""``dit-booth personalise``: one image of the user's, a run's folder, and an adapter that `dit_booth.load` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dit_booth
from dit_booth.commands.personalise import PersonaliseArguments as Arguments
from dit_booth.commands.personalise import main, settings_of, trains_adapter

TINY = [
    *("--steps", "2", "--prompts", "{} is spinning on sand", "--set", "data.size=12", "data.frames=2"),
    *("sampler.steps=2", "train.batch_size=2", "stages.subject.lr=0.01", "stages.subject.warmup=0"),
]


@pytest.fixture
def image(tmp_path: Path) -> str:
    pixels = np.full((24, 24, 3), 255, np.uint8)
    pixels[6:18, 6:18] = (200, 30, 30)
    Image.fromarray(pixels).save(tmp_path / "star.png")
    return str(tmp_path / "star.png")


@pytest.mark.slow
def test_an_image_becomes_a_run_and_an_adapter(in_process: Any, image: str, tmp_path: Path):
    out = tmp_path / "mine"
    command = ["--method", "textual_inversion", "--image", image, "--class", "star", "--out", str(out), *TINY]
    ended = in_process(*command, main=main)
    assert ended.code == 0, ended.output
    assert (out / "samples" / "000-seed0.mp4").is_file() and (out / "samples" / "contact_sheet.png").is_file()
    assert f"adapter         {out / 'strategy.safetensors'}" in ended.output
    videos = [
        dit_booth.load(source, device="cpu")(None, "a star runs", subject="star").frames
        for source in (out, out / "strategy.safetensors")
    ]
    plain = dit_booth.load(out, device="cpu")(None, "a star runs").frames
    assert np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], plain), "the control: without the subject the word has no effect"
    again = in_process(*command, main=main)
    assert again.code == 0 and "nothing to do" in again.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "dreambooht"], "--method is 'dreambooht'; nearest: dreambooth"),
        (["--method", "ip_adapter"], "--method ip_adapter is not optimized per subject: train it once"),
        (["--method", "tune_a_video"], "subject.video is empty, and subject.tune_on is video"),
        (["--class", ""], "--class is empty"),
        (["--image", "nothing.png"], "nothing.png: no such file"),
        (["--prompts", "a star"], "subject.prompts has 'a star'; write {} once"),
        (["--steps", "-1"], "--steps is -1"),
    ],
)
def test_bad_input_is_one_line(in_process: Any, image: str, tmp_path: Path, words: list[str], said: str):
    start = ["--image", image, "--class", "star", "--out", str(tmp_path / "mine")]
    ended = in_process(*start, *words, main=main)
    assert ended.code == 1
    (line,) = ended.errors()
    assert said in line
    assert not (tmp_path / "mine").exists()


def test_methods_say_if_their_adapter_holds_all(image: str):
    adapters = {
        method: trains_adapter(settings_of(Arguments(image=image, word="star", method=method)))
        for method in ("dreambooth_lora", "dreambooth_no_prior")
    }
    assert adapters == {"dreambooth_lora": True, "dreambooth_no_prior": False}
