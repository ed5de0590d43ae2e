"""Wan's image-to-video weights: latents equal to WanImageToVideoPipeline's, training, and what is refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_pipeline
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import dit_booth
from dit_booth.components import Components, build
from dit_booth.config import RunConfig
from dit_booth.data.example import Loader
from dit_booth.data.image_prompt import as_image_prompt, cut_to_aspect
from dit_booth.diffusion import GuidanceConfig
from dit_booth.diffusion.noise import randn
from dit_booth.models.wan.image_encoder import WanImageEncoder
from dit_booth.sampling.generate import FrameSampler
from dit_booth.testing import BACKBONES, trial
from dit_booth.training.address import stages_of
from dit_booth.training.encoded import EncodedData, encode_data
from dit_booth.training.inputs import generator_of, make_inputs
from dit_booth.training.stage import set_trainable, trainable_globs

torch.set_num_threads(1)
FRAMES, HEIGHT, WIDTH, STEPS = 9, 32, 48, 10
CAPTION, SEED, SCALE = "a red dog runs on the grass", 3, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wan-image")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return wan_pipeline.write(folder, image=True)


@pytest.fixture(scope="module")
def config(theirs: Any, folder: Path) -> RunConfig:
    return RunConfig.create(
        weights=str(folder),
        strategy="image_to_video",
        data={"frames": 5, "size": 16, "image_size": WIDTH},
        text={"dtype": "float32"},
        guidance={"text": SCALE, "image": 1.0},
    )


@pytest.fixture(scope="module")
def ours(config: RunConfig) -> Components:
    return build(config)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A picture of the video's aspect."""
    colours = torch.randint(256, (HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(colours.to(torch.uint8).numpy())


def latents_of(ours: Components, image: Any, guidance: GuidanceConfig | None = None) -> Tensor:
    prompt = as_image_prompt(image, size=ours.config.data.image_size)[None]
    return FrameSampler.build(
        ours,
        prompt,
        [CAPTION],
        [None],
        [SEED],
        size=(FRAMES, HEIGHT, WIDTH),
        guidance=guidance or ours.config.guidance,
        sampler=replace(ours.config.sampler, steps=STEPS),
    ).latents.next_block()


@torch.no_grad()
def test_ten_guided_steps_are_wan_image_to_video_pipelines(
    ours: Components, theirs: Any, picture: Image.Image
) -> None:
    """The picture, padded to a square image prompt, comes back as the first frame: its latents and CLIP's states."""
    draws = [torch.Generator().manual_seed(SEED)]
    noise = randn((1, 3, 4, HEIGHT // 8, WIDTH // 8), draws, torch.device("cpu"), torch.float32)
    expected = theirs(
        image=picture,
        prompt=CAPTION,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=rearrange(noise, "b f c h w -> b c f h w"),
        output_type="latent",
    ).frames
    found = latents_of(ours, picture)
    torch.testing.assert_close(found, rearrange(expected, "b c f h w -> b f c h w"), rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5
    other = latents_of(ours, Image.new("RGB", (WIDTH, HEIGHT), "red"))
    assert (other - found).abs().max() > 0.05


@torch.no_grad()
def test_in_bfloat16_parts_stay_in_float32_and_samples_stay_near(
    config: RunConfig, ours: Components, picture: Image.Image
) -> None:
    half = build(config)
    half.model.to_precision(torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    kinds = {name: p.dtype for name, p in half.model.backbone.named_parameters()}
    assert kinds["scale_shift_table"] == kinds["blocks.0.norm2.weight"] == torch.float32
    found, exact = latents_of(half, picture), latents_of(ours, picture)
    assert found.dtype == torch.bfloat16 and 0 < (found - exact).abs().mean() < 0.05 * exact.abs().mean()


@torch.no_grad()
def test_a_dropped_image_leaves_the_channels_empty(ours: Components, picture: Image.Image) -> None:
    images = torch.stack([as_image_prompt(picture, size=WIDTH), torch.zeros(3, WIDTH, WIDTH)])
    reference = ours.with_first_frame(ours.reference(images, torch.float32), 3, 4, 6)
    assert reference.first_frame is not None and reference.first_frame.latent.shape == (2, 3, 4, 4, 6)
    made = ours.model.strategy.part("image_to_video")(reference, {}).shared.latent
    assert made[0, 0, 0].eq(1).all() and not made[0, 1:, 0].any() and made[0, 1:, 1:].any()
    assert not made[1].any()


def test_a_training_step_on_files_and_on_encoded_data(
    config: RunConfig, tmp_path: Path, write_triplets: Callable[..., Path]
) -> None:
    """Encoded data hold pixels of the image prompts: the first frame is made of them in the step."""
    root = write_triplets(tmp_path / "data", [f"a red box number {i}" for i in range(2)], "box")
    data = replace(
        config.data,
        kind="triplets",
        triplets=replace(config.data.triplets, root=str(root), stride=1),
        image_size=16,
        variations=1,
    )
    whole = build(replace(config, data=data, train=replace(config.train, batch_size=2)))
    list(encode_data(whole, tmp_path / "cache"))
    lean = replace(whole, config=replace(whole.config, data=replace(data, cache=str(tmp_path / "cache"))))
    outputs = []
    for components, dataset in ((whole, whole.dataset()), (lean, EncodedData(lean.config))):
        batch = Loader(dataset, batch_size=2, seed=3).batch(0)  # type: ignore[arg-type]
        draws = [generator_of(0, row) for row in range(2)]
        stage = replace(config.stages.fine, drop=0.0)
        inputs = make_inputs(components, batch, stage, draws, torch.float32, with_image=True)
        assert inputs.reference is not None and inputs.reference.first_frame is not None
        outputs.append(inputs.predict(components.model).output)
    torch.testing.assert_close(*outputs)
    trained = set_trainable(
        whole.model, trainable_globs(whole.config, whole.model, "fine", ["image_to_video"])
    )
    outputs[0].square().mean().backward()
    assert len(trained) == 20 and all(p.grad is not None and p.grad.any() for p in trained.values())


def test_the_folders_own_weights_sample_an_image(
    theirs: Any, folder: Path, in_process: Any, picture: Image.Image, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    size = ["--data.frames", "5", "--data.size", "16", "--data.image-size", "48"]
    flags = [*size, "--sampler.steps", "2", "--text.dtype", "float32"]
    ended = in_process("--config", "wan_image_sample", "--weights", str(folder), *flags, "--out", str(out))
    assert ended.code == 0, ended.output
    video = dit_booth.load(out, device="cpu")(picture, CAPTION, frames=5, size=(HEIGHT, WIDTH))
    assert video.frames.shape == (5, HEIGHT, WIDTH, 3)


def test_the_middle_of_an_image_prompt_has_the_videos_aspect() -> None:
    square = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert torch.equal(cut_to_aspect(square, 20, 30), square[..., 1:5, :])
    assert torch.equal(cut_to_aspect(square, 30, 10), square[..., 2:4])
    assert cut_to_aspect(square, 1, 1000).shape == (1, 1, 1, 6)


def test_the_image_encoder_counts_by_its_content(config: RunConfig, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")

    def address(**wan: Any) -> str:
        return stages_of(replace(config, wan=replace(config.wan, **wan)))[0].address

    before = address()
    assert address(image_encoder=str(copy)) == before, "not where it lies"
    (copy / "image_encoder" / "more.json").write_text("{}")
    assert address(image_encoder=str(copy)) != before


# ---- what is refused ---------------------------------------------------------------------------------------


def test_text_to_video_weights_are_no_image_to_video_weights(tmp_path: Path) -> None:
    wan_pipeline.write(tmp_path)
    options: dict[str, Any] = {
        "data": {"frames": 5, "size": 16, "image_size": 16},
        "text": {"dtype": "float32"},
    }
    asked = RunConfig.create("wan_image_sample", weights=str(tmp_path), **options)
    with pytest.raises(ValueError, match=r"these are text-to-video weights, .*image-to-video pipeline"):
        build(asked)


def test_weights_with_other_channels_are_refused() -> None:
    wan = replace(BACKBONES["wan"]["wan"], condition_channels=54)  # two more videos, and no mask
    with pytest.raises(ValueError, match=r"wan\.condition_channels is 54; .* 4 of a mask and 27 of latents"):
        trial("image_to_video", "wan", wan=wan)


def test_an_image_encoder_that_does_not_fit(theirs: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"wan\.image_encoder is '', which has no image_encoder/config\.json"
    ):
        WanImageEncoder("", 20)
    with pytest.raises(ValueError, match=r"holds clip_vision_model of width 20, not .* of width 1280"):
        WanImageEncoder(str(folder), 1280)
    copy = Path(shutil.copytree(folder / "image_encoder", tmp_path / "image_encoder")).parent
    with pytest.raises(ValueError, match=r"has no image_processor/preprocessor_config\.json"):
        WanImageEncoder(str(copy), 20)
    shutil.copytree(folder / "image_processor", tmp_path / "image_processor")
    file = copy / "image_encoder" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "visual_projection.weight": torch.zeros(4, 20)}, file, {"format": "pt"})
    WanImageEncoder(str(copy), 20)  # as saved with its projection
    state.popitem()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit CLIPVisionModel: .*missing_keys"):
        WanImageEncoder(str(copy), 20)
    file.unlink()
    with pytest.raises(ValueError, match=r"image_encoder has no model\.safetensors"):
        WanImageEncoder(str(copy), 20)


def test_weights_that_see_zeros_are_named_in_the_log(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(replace(config, strategy="none")).state_encoder is None
    assert "see zeros without strategy image_to_video" in caplog.text
