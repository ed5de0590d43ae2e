"""The front door: loading, calling and saving a pipeline, models by name, and what `import dit_booth` costs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

import dit_booth
from dit_booth.commands.sample import SampleArguments
from dit_booth.config import RunConfig
from dit_booth.models.registry import MODELS, create_model, list_models
from dit_booth.models.weights import ASSETS, read
from dit_booth.pipeline import EMBEDDED, Pipeline
from dit_booth.sampling.video import Video

TEXT = "a star is spinning on snow"
SHORT = {"sampler": {"steps": 2}}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load("toyworld", settings=SHORT)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.full((40, 40, 3), 255, np.uint8)
    pixels[10:30, 10:30] = (200, 30, 40)
    return Image.fromarray(pixels)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, dit_booth; print([m for m in ('torch', 'numpy', 'diffusers', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_of_the_front_door_is_there() -> None:
    for name in dit_booth.__all__:
        assert getattr(dit_booth, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'lod'; it has"):
        _ = dit_booth.lod


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_pipelines_follow_the_image(name: str, picture: Image.Image) -> None:
    pipe = Pipeline.load(name, settings={"sampler": {"steps": 4}})
    other = Image.fromarray(np.asarray(picture)[..., ::-1].copy())
    red, blue = (pipe(image, TEXT, subject="star", seed=3).tensor for image in (picture, other))
    assert (red[:, 0] - red[:, 2]).mean() > (blue[:, 0] - blue[:, 2]).mean() + 0.02, (
        "redder than the blue one"
    )


def test_a_call_is_a_function_of_its_arguments(pipe: Pipeline, picture: Image.Image) -> None:
    one = pipe(picture, TEXT, subject="star", seed=1)
    assert one.frames.shape == (8, 32, 32, 3) and one.frames.dtype == np.uint8
    assert one.fps == 8 and one.text == TEXT and one.image is not None and one.image.shape == (32, 32, 3)
    assert np.array_equal(one.frames, pipe(picture, TEXT, subject="star", seed=1).frames)
    for changed in (
        pipe(picture, TEXT, subject="star", seed=2),
        pipe(None, TEXT, subject="star", seed=1),
        pipe(picture, TEXT, subject="star", seed=1, guidance=3.0),
        pipe(picture, TEXT, subject="star", seed=1, steps=3),
    ):
        assert not np.array_equal(one.frames, changed.frames)
    assert pipe(picture, TEXT, subject="star", frames=3, size=(16, 24)).frames.shape == (3, 16, 24, 3)


def test_images_of_every_kind_give_the_same_video(
    pipe: Pipeline, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "star.png")
    pixels = np.asarray(picture)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    videos = [
        pipe(image, TEXT, subject="star").frames
        for image in (picture, str(tmp_path / "star.png"), tmp_path / "star.png", pixels, tensor)
    ]
    assert all(np.array_equal(videos[0], video) for video in videos[1:])


def test_several_images_at_a_call(pipe: Pipeline, picture: Image.Image) -> None:
    """The embedded strategies read the first one."""
    call: Any = {"subject": "star", "frames": 2}
    one = pipe(picture, TEXT, **call).frames
    assert np.array_equal(pipe([picture], TEXT, mask=[None], **call).frames, one)
    with pytest.raises(ValueError, match=r"image has 2 images; give 1 to 1, .* \(data\.image_prompts\)"):
        pipe([picture, picture], TEXT, **call)
    two = replace(pipe, config=replace(pipe.config, data=replace(pipe.config.data, image_prompts=2)))
    other = Image.fromarray(np.asarray(picture)[..., ::-1].copy())
    assert np.array_equal(two([picture, other], TEXT, **call).frames, one)
    assert np.array_equal(two(picture, TEXT, **call).frames, one), "the second is absent"
    for images, mask, says in (
        ([picture, other], [None], "mask has 1 masks for 2 images; give each image its own, or None"),
        ([], None, "image has 0 images; give 1 to 2"),
    ):
        with pytest.raises(ValueError, match=says):
            two(images, TEXT, mask=mask, **call)
    white = Image.new("RGB", (8, 8), "white")
    with pytest.raises(ValueError, match="number 2, is all white"):
        two([picture, white], TEXT, **call)
    parsed = tyro.cli(SampleArguments, args=["toyworld", "--image", "a.png", "b.png", "--caption", "x"])
    assert parsed.image == ("a.png", "b.png")


def test_bad_calls_say_what_is_wrong(pipe: Pipeline, picture: Image.Image) -> None:
    for arguments, says in (
        ({"text": TEXT}, "subject is missing; name the words"),
        ({"text": TEXT, "subject": "cat"}, "subject 'cat' is not in caption"),
        ({"text": " ", "subject": "star"}, "text is empty"),
        ({"text": TEXT, "subject": ""}, "subject is missing; name the words"),
        ({"text": TEXT, "subject": "star", "frames": 0}, r"frames is 0; use a whole number in \[1, 10000\]"),
        ({"text": TEXT, "subject": "star", "size": (0, 32)}, "size is 0; use a whole number"),
        (
            {"text": TEXT, "subject": "star", "size": 33},
            "size is 33 x 33 pixels; the autoencoder needs multiples",
        ),
        ({"text": TEXT, "subject": "star", "seed": -1}, "seed is -1; use a whole number"),
        (
            {"text": TEXT, "subject": "star", "seed": 2**70},
            "seed is 1180591620717411303424; use a whole number",
        ),
        ({"text": TEXT, "subject": "star", "steps": 0}, "steps"),
        ({"text": TEXT, "subject": "star", "guidance": float("nan")}, "scale"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(picture, **arguments)  # type: ignore[arg-type]


def test_a_saved_pipeline_loads_as_it_was(pipe: Pipeline, picture: Image.Image, tmp_path: Path) -> None:
    expected = pipe(picture, TEXT, subject="star").frames
    folder = pipe.save(tmp_path / "mine")
    again = dit_booth.load(folder)
    assert np.array_equal(again(picture, TEXT, subject="star").frames, expected)
    alone = dit_booth.load(folder / "strategy.safetensors")
    assert np.array_equal(alone(picture, TEXT, subject="star").frames, expected), "the adapter on its base"
    based = dit_booth.load(folder / "strategy.safetensors", base=str(folder / "weights.safetensors"))
    assert np.array_equal(based(picture, TEXT, subject="star").frames, expected)


def test_a_pipeline_in_bfloat16_samples_nearly_the_same(pipe: Pipeline, picture: Image.Image) -> None:
    half = dit_booth.load("toyworld", settings=SHORT, dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    videos = [p(picture, TEXT, subject="star").frames.astype(float) for p in (pipe, half)]
    assert 0 < np.abs(videos[0] - videos[1]).mean() < 3


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    for source, says in (
        ("toywrld", "is no run folder, no adapter file and not embedded; nearest: toyworld"),
        (tmp_path, "is not a finished run"),
    ):
        with pytest.raises(ValueError, match=says):
            dit_booth.load(source)
    with pytest.raises(ValueError, match=r"setting 'guidance\.imge' is unknown; nearest: image"):
        dit_booth.load("toyworld", settings={"guidance": {"imge": 3}})
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not tell its run's settings"):
        dit_booth.load(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        dit_booth.load(tmp_path / "broken.safetensors")


def test_models_by_name() -> None:
    assert list_models("*nano") == ["dit-nano", "unet-nano", "wan-nano"]
    plain, trained = create_model("dit-nano"), create_model("dit-nano", "kv_concat", pretrained=True)
    assert not list(plain.strategy.parameters()) and list(trained.strategy.parameters())
    toyworld = RunConfig.create("toyworld")
    assert MODELS["dit-nano"].backbone == toyworld.dit
    assert MODELS["unet-nano"].backbone == toyworld.unet
    for name, pretrained, says in (
        ("dit-nan", False, "model 'dit-nan' is unknown; nearest: dit-nano"),
        ("dit-xl", True, "no weights of dit-xl are embedded"),
    ):
        with pytest.raises(ValueError, match=says):
            create_model(name, pretrained=pretrained)


@pytest.mark.parametrize("file", EMBEDDED.values())
def test_embedded_adapters_are_small_and_finite(file: str) -> None:
    path = ASSETS / file
    assert path.stat().st_size < 2e6
    assert all(value.isfinite().all() for value in read(path).values())


def test_the_readmes_first_lines_run(
    picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    picture.save("star.png")
    exec(lines, {})
    assert (tmp_path / "star.mp4").is_file()


def test_a_video_is_streamed_and_written_as_it_is_called(
    pipe: Pipeline, picture: Image.Image, tmp_path: Path
) -> None:
    call: Any = {"subject": "star", "seed": 1, "frames": 12, "long": "chunks"}
    video = pipe(picture, TEXT, **call)
    blocks = list(pipe.stream(picture, TEXT, **call))
    assert [len(block) for block in blocks] == [8, 4] and np.array_equal(np.concatenate(blocks), video.frames)
    path = pipe.write(tmp_path / "a.mp4", picture, TEXT, **call)
    read = Video.read(path, text=TEXT, stride=2)
    assert read.fps == 8 and len(read) == 6
    far = [np.abs(read.frames.mean(-1) - video.frames[at::2].mean(-1)).mean() for at in (0, 1)]
    assert far[0] < 4 < far[1], "the encoder's loss, less than a frame's change"
    with pytest.raises(ValueError, match=r"path is 'a\.gif'; a video is written as an .mp4 file"):
        pipe.write("a.gif", picture, TEXT, **call)
    with pytest.raises(ValueError, match=r"sample\.long\.kind is 'rings'; choose one of none, chunks"):
        pipe(picture, TEXT, **{**call, "long": "rings"})
