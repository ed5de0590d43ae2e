"""Videos longer than those of the training, without training: FreeNoise's noise and windows, RIFLEx's frequency."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth.attention import Clip, Riflex, Segment, WindowFusion, attend, attend_in_windows
from dit_booth.config import LongConfig
from dit_booth.diffusion.free_noise import draw_permutations, reschedule, source_frames
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.diffusion.start import StartConfig
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.positions import riflex_frequencies, rotary_3d, rotary_frames
from dit_booth.models.unet.model import UNetConfig
from dit_booth.sampling.generate import check_long, generate
from dit_booth.testing import Trial, trial, worst
from dit_booth.testing.tiny import SIZE

torch.set_num_threads(1)
F64 = torch.float64
FREENOISE = LongConfig(kind="freenoise", window=4, stride=2)
ROTARY: dict[str, Any] = {"dit": DiTConfig(depth=1, hidden=32, heads=2, positions="rotary")}


# ---- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [3, 8, 11, 16])
def test_noise_after_the_first_window_is_shuffled_from_one_window_earlier(frames: int) -> None:
    draws = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    noise = torch.randn(2, frames, 2, 3, 3)
    made = reschedule(noise, 4, 3, draws)
    assert torch.equal(made[:, :4], noise[:, :4])
    for row in range(2):
        for at in range(4, frames, 3):
            count = min(3, frames - at)
            ours, earlier = made[row, at : at + count], made[row, at - 4 : at - 4 + count]
            assert sorted(ours.flatten(1).sum(1).tolist()) == sorted(earlier.flatten(1).sum(1).tolist())
    alone = reschedule(noise[1:], 4, 3, [torch.Generator().manual_seed(1)])
    assert torch.equal(alone[0], made[1]), "a row's shuffles are its own"


def test_steps_shuffle_what_earlier_steps_have_put_there() -> None:
    permutations = [torch.tensor([1, 0]), torch.tensor([3, 2]), torch.tensor([5])]
    assert source_frames(7, 2, permutations).tolist() == [0, 1, 1, 0, 0, 1, 1]
    drawn = draw_permutations(7, 2, 2, torch.Generator().manual_seed(0))
    assert [sorted(p.tolist()) for p in drawn] == [[0, 1], [2, 3], [4]], "the last step has what is left"


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 4, 5, 8, 13])
def test_every_frame_lies_in_a_window(frames: int) -> None:
    fusion = WindowFusion(4, 3)
    starts = fusion.starts(frames)
    assert {i for start in starts for i in range(start, min(start + 4, frames))} == set(range(frames))
    assert fusion.starts(frames, released=True) == starts[: max(0, (frames - 4) // 3 + 1)]


def test_one_window_is_plain_attention_and_further_segments_are_read_in_every_window() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, image = (torch.randn(2, 1, 6, 2, 4, generator=generator, dtype=F64) for _ in range(4))
    segments = (Segment(k, v, ((0,),)), Segment(image[:, :, :3], image[:, :, :3], ((0,),), query=2 * q))
    assert torch.equal(attend_in_windows(q, segments, WindowFusion(6, 2)), attend(q, segments))
    fused = attend_in_windows(q, segments, WindowFusion(4, 2))  # windows 0..3 and 2..5, weights 1 2 2 1
    parts = []
    for rows in (slice(0, 4), slice(2, 6)):
        cut = [Segment(k[:, :, rows], v[:, :, rows], ((0,),)), replace(segments[1], query=2 * q[:, :, rows])]
        parts.append(attend(q[:, :, rows], cut)[:, 0])
    assert worst(fused[:, 0, :2], parts[0][:, :2]) < 1e-12 and worst(fused[:, 0, 4:], parts[1][:, 2:]) < 1e-12
    third = (2 * parts[0][:, 2] + 1 * parts[1][:, 0]) / 3
    assert worst(fused[:, 0, 2], third) < 1e-12


def alone(backbone: str) -> dict[str, Any]:
    """A backbone whose frames meet in temporal attention only."""
    if backbone == "dit":
        return {"dit": DiTConfig(depth=1, hidden=32, heads=2, plan="self")}
    config = UNetConfig(
        channels=(8,), norm_groups=4, heads=1, layers_per_block=1, down_attention=(True,), plan="self"
    )
    return {"backbone": "unet", "unet": config}


@pytest.mark.parametrize("backbone", ["dit", "unet"])
@torch.no_grad()
def test_frames_without_a_common_window_do_not_meet(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trial("none", **alone(backbone))
    if backbone == "unet":  # its group norms pool all frames
        for module in run.model.backbone.modules():
            if isinstance(module, torch.nn.GroupNorm):
                monkeypatch.setattr(module, "forward", lambda x, context=0: x)
    x = torch.randn(2, 8, *run.x.shape[2:], generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 7] += 1

    def moved(clip: Clip) -> list[bool]:
        a, b = (run.model(y, run.t, run.prompt, clip=clip).output for y in (x, changed))
        return [bool(c) for c in (a - b).abs().amax(dim=(0, 2, 3, 4)) > 1e-7]

    assert moved(Clip(range(8))) == [True] * 8
    fused = moved(Clip(range(8), fusion=WindowFusion(4, 4)))
    assert fused == [False] * 4 + [True] * 4
    whole = Clip(range(8), fusion=WindowFusion(8, 1))
    outputs = [run.model(x, run.t, run.prompt, clip=clip).output for clip in (whole, Clip(range(8)))]
    assert torch.equal(*outputs), "one window is the plain pass"


# ---- sampling ------------------------------------------------------------------------------------------------------


def sampled(run: Trial, rows: slice = slice(0, 2), frames: int = 9, **options: Any) -> Tensor:
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return generate(
        run.components,
        images[rows],
        ["a dog runs", "the red cat and a cat"][rows],
        ["dog", "cat"][rows],
        [3, 4][rows],
        size=(frames, SIZE, SIZE),
        guidance=GuidanceConfig(scale=2.0),
        sampler=SamplerConfig(steps=2),
        **options,
    )


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_freenoise_samples_long_videos_row_by_row(backbone: str) -> None:
    run = trial("kv_concat", backbone)
    video = sampled(run, long=FREENOISE)
    assert video.shape == (2, 9, 3, SIZE, SIZE) and torch.isfinite(video).all()
    assert worst(sampled(run, slice(1, 2), long=FREENOISE)[0], video[1]) < 1e-3
    assert worst(sampled(run), video) > 1e-2
    by_default = sampled(run, long=replace(FREENOISE, window=0))  # data.frames: 3
    assert worst(by_default, sampled(run, long=replace(FREENOISE, window=3))) == 0 < worst(by_default, video)


def test_a_window_longer_than_the_training_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        check_long(trial("none").components, 9, StartConfig(), replace(FREENOISE, window=7), None)
    check_long(trial("none").components, 9, StartConfig(), replace(FREENOISE, window=3), None)
    (record,) = [r for r in caplog.records if "sample.long.window" in r.message]
    assert "sample.long.window is 7, but the training's videos have 3 frames" in record.message


def test_freenoise_needs_temporal_attention_over_all_frames() -> None:
    with pytest.raises(ValueError, match=r"sample\.long\.kind is freenoise.*dit\.layout joint or image"):
        sampled(trial("none", "dit-joint"), long=FREENOISE)
    planned = {"dit": DiTConfig(depth=1, hidden=32, heads=2, temporal_plan="window(2)")}
    for run in (trial("none", **planned), trial("in_context")):
        with pytest.raises(
            ValueError, match=r"\(freenoise\) need temporal_plan all, and no reference before"
        ):
            sampled(run, long=FREENOISE)
    with pytest.raises(ValueError, match=r"sample\.long\.stride is 4, more than sample\.long\.window 2"):
        LongConfig(kind="freenoise", window=2)


def test_riflex_lowers_the_frequency_that_repeats_after_a_training_video() -> None:
    frequency = 2 * math.pi / torch.tensor([4.0, 11.0, 30.0, 200.0], dtype=F64)
    changed = riflex_frequencies(frequency, Riflex(trained=8, length=40))
    assert torch.equal(changed[[0, 2, 3]], frequency[[0, 2, 3]])
    assert changed[1].item() == pytest.approx(0.9 * 2 * math.pi / 40), "a period of 40 / 0.9 frames"
    for length in (5, 8):
        assert torch.equal(riflex_frequencies(frequency, Riflex(8, length)), frequency)
    place = torch.device("cpu")
    plain, long = (rotary_3d(range(6), 2, 2, 16, place, F64, riflex) for riflex in (None, Riflex(3, 6)))
    differs = (plain.cos - long.cos).abs().amax(dim=(0, 1, 2)) > 1e-9
    assert differs.tolist() == ([True] + [False] * 7) * 2, "one pair of the frame's four"
    in_time = rotary_frames(range(6), 16, place, F64, group_per_frame=False, riflex=Riflex(3, 6))
    assert in_time.cos.shape == (1, 6, 1, 16)


@torch.no_grad()
def test_riflex_is_an_option_of_sampling_for_backbones_with_rotary_time() -> None:
    run = trial("none", **ROTARY)
    assert torch.equal(sampled(run, long=LongConfig(riflex=9)), sampled(run)), "no longer than the training's"
    assert worst(sampled(run, long=LongConfig(riflex=3)), sampled(run)) > 1e-4
    unet = trial(
        "none",
        "unet",
        unet=replace(trial("none", "unet").components.config.unet, positions="rotary", heads=1),
    )
    assert worst(sampled(unet, long=LongConfig(riflex=3)), sampled(unet)) > 1e-5
    for backbone, field in (
        ("dit-factorised", "dit.positions is sincos"),
        ("unet", "unet.positions is none"),
    ):
        with pytest.raises(
            ValueError, match=rf"sample\.long\.riflex changes rotary frequencies, but {field}"
        ):
            sampled(trial("none", backbone), long=LongConfig(riflex=3))
