"""What sampling starts from: noise, moved latents (Text2Video-Zero), an inverted video (Tune-A-Video)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import reduce
from torch import Tensor

from dit_booth.config import LongConfig
from dit_booth.config.subject import SubjectConfig
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import write_video
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.objectives import make_objective
from dit_booth.diffusion.samplers import SamplerConfig, sample
from dit_booth.diffusion.start import StartConfig, WarpedStart
from dit_booth.pipeline import Pipeline
from dit_booth.sampling.generate import foreground_of, generate

torch.set_num_threads(1)

OBJECTIVES = {"flow": ObjectiveConfig(kind="flow"), "eps": ObjectiveConfig(kind="eps")}


def smooth(x: Tensor, timestep: Tensor) -> Tensor:
    return 0.3 * torch.tanh(x) + 0.1 * timestep.reshape(-1, 1, 1, 1, 1) / 1000


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_part_of_the_steps_and_the_rest_are_all_steps(kind: str):
    objective, config = make_objective(OBJECTIVES[kind]), SamplerConfig(steps=10)
    noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    half = sample(smooth, objective, config, noise, steps=range(4))
    rest = sample(smooth, objective, config, half, steps=range(4, 10))
    assert torch.allclose(rest, sample(smooth, objective, config, noise), atol=1e-5)
    assert torch.equal(sample(smooth, objective, config, noise, steps=range(0)), noise)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_moved_frames_are_those_of_frame_0_where_no_noise_is_added(kind: str):
    objective, config = make_objective(OBJECTIVES[kind]), SamplerConfig(steps=10)
    noise = torch.randn(1, 3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    start = StartConfig(
        kind="warp", denoised=0.5, renoised=0.5, motion=(64.0, 0.0)
    )  # 64 of 512: one of eight columns
    draws = [torch.Generator().manual_seed(1)]
    warped = WarpedStart(objective, config, start)
    moved, step = warped.latents(smooth, noise, range(3), draws)
    first = sample(smooth, objective, config, noise[:, :1], draws, steps=range(5))
    assert step == 5 and torch.allclose(moved[:, 0], first[:, 0], atol=1e-5)
    for frame in (1, 2):
        assert torch.allclose(moved[:, frame, ..., :-frame], first[:, 0, ..., frame:], atol=1e-5)
    later, _ = warped.latents(smooth, torch.zeros_like(noise[:, :2]), range(2, 4), draws)
    assert torch.equal(later[:, 0], moved[:, 2]), "a part of a video moves frame 0 by the frames' own indices"


def test_the_moved_background_of_frame_0_is_mixed_in_where_no_subject_is():
    config = StartConfig(kind="warp", motion=(64.0, 0.0), background=0.6)  # a column of eight per frame
    start = WarpedStart(make_objective(OBJECTIVES["flow"]), SamplerConfig(), config)
    latents = torch.randn(1, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    foreground = torch.zeros(1, 2, 1, 8, 8)
    foreground[0, 0, 0, 2, 5] = foreground[0, 1, 0, 6, 1] = 1  # the former moves to column 4
    smooth = start.smooth(latents, foreground)
    assert torch.equal(smooth[:, 0], latents[:, 0])
    mixed = 0.6 * latents[0, 0, :, :, 1:] + 0.4 * latents[0, 1, :, :, :-1]
    for row, column in ((2, 4), (6, 1)):
        assert torch.equal(smooth[0, 1, :, row, column], latents[0, 1, :, row, column])
        mixed[:, row, column] = latents[0, 1, :, row, column]
    torch.testing.assert_close(smooth[0, 1, :, :, :-1], mixed)


def test_noise_is_added_up_to_the_level_of_the_step_that_goes_on():
    objective, config = make_objective(OBJECTIVES["flow"]), SamplerConfig(steps=50)
    noise = torch.randn(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    draws = [torch.Generator().manual_seed(i) for i in range(4)]
    moved, step = WarpedStart(objective, config, StartConfig(kind="warp")).latents(
        smooth, noise, range(4), draws
    )
    assert step == 3
    correlation = torch.corrcoef(torch.stack([moved[:, 0].flatten(), moved[:, 1].flatten()]))[0, 1]
    assert -0.2 < correlation < 0.5  # shared content, mostly fresh noise


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"renoised": 0.5}, "start.renoised is 0.5, more than start.denoised 0.12"),
        ({"denoised": 1.0}, "start.denoised is 1.0"),
        ({"motion": (1000.0, 0.0)}, "start.motion is"),
        ({"background": 1.5}, "start.background is 1.5"),
    ],
)
def test_a_start_that_cannot_be_is_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StartConfig(**values)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load("toyworld")


def test_an_inverted_video_comes_back(pipeline: Pipeline, tmp_path: Path):
    example = Toyworld(ToyworldConfig(split="dev"))[3]
    write_video(tmp_path / "a.mp4", example.video, fps=8, lossless=True)
    subject = SubjectConfig(
        image="x.png", video=str(tmp_path / "a.mp4"), tune_on="video", word=example.subject
    )
    components = replace(pipeline, config=replace(pipeline.config, subject=subject))

    def error(steps: int, kind: str) -> float:
        (video,) = generate(
            components, example.image[None], ["None"], [None], [0], size=(8, 32, 32),
            guidance=GuidanceConfig(scale=1.0), sampler=SamplerConfig(steps=steps), start=StartConfig(kind=kind),
            use_image=False,
        )  # fmt: skip
        return float((video - example.video).abs().mean())

    inverted = error(20, "inversion")
    assert inverted < 0.5 * error(20, "noise")


def test_a_video_whose_background_is_smoothed_is_sampled_again(pipeline: Pipeline):
    def sampled(background: float, **options: Any) -> Tensor:
        start = StartConfig(kind="warp", denoised=0.5, renoised=0.25, background=background)
        return generate(
            pipeline, torch.ones(1, 3, 32, 32), ["a star is resting on sand"], [None], [0], size=(3, 32, 32),
            guidance=GuidanceConfig(scale=1.0), sampler=SamplerConfig(steps=4, eta=0.0), start=start, use_image=False,
            **options,
        )  # fmt: skip

    assert not torch.equal(sampled(0.6), sampled(0.0))
    with pytest.raises(ValueError, match=r"start.background is 0.6, but sample.long.kind is chunks"):
        sampled(0.6, long=LongConfig(kind="chunks"))


def test_the_foreground_is_the_subject_at_the_latents_resolution(pipeline: Pipeline):
    example = Toyworld(ToyworldConfig(split="dev"))[3]
    latents = pipeline.autoencoder.encode(example.video[None], None)
    found = foreground_of(pipeline, latents)[0, :, 0].bool()
    assert found.shape == (8, *latents.shape[-2:])
    true = reduce(example.mask.float(), "f (h i) (w j) -> f h w", "max", i=2, j=2).bool()
    assert (found & true).sum() > 0.8 * (found | true).sum()
