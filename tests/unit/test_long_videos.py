"""Videos far longer than those of the training: chunks, a queue, LVDM's hierarchy."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from long_trials import CHUNKS, KINDS, LVDM, QUEUE, sampler_of
from torch import Tensor

from dit_booth.attention import Clip, PrefixCache
from dit_booth.commands.sample import SampleArguments, load
from dit_booth.config import LongConfig, SampleConfig
from dit_booth.diffusion import ObjectiveConfig, make_objective, sample
from dit_booth.diffusion.frame_queue import FrameSteps, steps_of
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.diffusion.start import StartConfig
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.unet.blocks import VideoNorm
from dit_booth.models.unet.model import UNetConfig
from dit_booth.pipeline import Pipeline
from dit_booth.sampling.generate import generate
from dit_booth.sampling.long import warn_of_timesteps
from dit_booth.sampling.prompts import requests_of, sample_prompts
from dit_booth.testing import Trial, trial, worst
from dit_booth.testing.tiny import SIZE
from dit_booth.training.distributed import Ranks

torch.set_num_threads(1)
F64 = torch.float64
CAUSAL: dict[str, dict[str, Any]] = {
    "dit": {"dit": DiTConfig(depth=2, hidden=32, heads=2, plan="first+previous", temporal_plan="window(2)")},
    "unet": {
        "backbone": "unet",
        "unet": UNetConfig(
            channels=(8, 16),
            norm_groups=4,
            heads=1,
            layers_per_block=1,
            down_attention=(False, True),
            plan="sink(1)+window(2)",
            temporal_plan="window(3)",
        ),
    },
}


def video(run: Trial, long: LongConfig, frames: int = 9, rows: slice = slice(0, 1)) -> Tensor:
    return torch.cat(list(sampler_of(run, long, frames, rows)), dim=1)


@torch.no_grad()
def latents(run: Trial, long: LongConfig) -> Tensor:
    sampler, found = sampler_of(run, long), []
    while sampler.done < sampler.frames:
        found.append(sampler.latents.next_block())
    return torch.cat(found, dim=1)


# ---- a prefix's keys and values ------------------------------------------------------------------------------------


def frame_by_frame(self: VideoNorm, x: Tensor, context: int = 0) -> Tensor:
    return torch.nn.GroupNorm.forward(self, x.flatten(0, 1)).reshape(x.shape)


@pytest.mark.parametrize("prefix", [(5, 6), (0, 5, 6), (0, 2, 6)])
@pytest.mark.parametrize("backbone", CAUSAL)
@torch.no_grad()
def test_a_cached_prefix_equals_a_pass_with_the_prefix(
    backbone: str, prefix: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, at two noise levels with one cache; the U-Net with norms of single frames."""
    monkeypatch.setattr(VideoNorm, "forward", frame_by_frame)
    run = trial("adaln", **CAUSAL[backbone]).perturb()
    run.model.double()
    reference = run.reference()
    reference = replace(
        reference,
        states=tuple(s.double() for s in reference.states),
        embedding=reference.embedding.double(),
        latent=reference.latent.double(),
    )
    new, count = (7, 8, 9), len(prefix)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, count + 3, *run.x.shape[2:], generator=draw, dtype=F64)
    cache = PrefixCache(run.model.backbone.make_frame_cache().plans, prefix)  # type: ignore[operator, union-attr]
    clean = torch.zeros(2, count)
    run.model(x[:, :count], clean, run.prompt, reference, clip=Clip(prefix, cache))
    for level in (900.0, 300.0):
        t = torch.full((2,), level)
        times = torch.cat([clean, torch.full((2, 3), level)], dim=1)
        whole = run.model(x, times, run.prompt, reference, clip=Clip((*prefix, *new))).output[:, count:]
        cached = run.model(x[:, count:], t, run.prompt, reference, clip=Clip(new, cache)).output
        assert worst(cached, whole) < 1e-10
        apart = run.model(x[:, count:], t, run.prompt, reference, clip=Clip(new)).output
        assert worst(apart, whole) > 1e-4, "the prefix matters"


@pytest.mark.parametrize("strategy", ["kv_concat", "adaln"])
def test_chunks_with_the_cache_are_chunks_without(strategy: str) -> None:
    """A whole video in float64: the reference is clean in both, so strategies with matched noise agree, too."""
    run = trial(strategy, **CAUSAL["dit"]).perturb()
    run.model.double()
    cached, computed = (latents(run, replace(CHUNKS, cache=cache)) for cache in (True, False))
    assert cached.dtype == F64 and cached.shape[1] == 9
    assert worst(cached, computed) < 1e-10 * cached.abs().max().item()


# ---- every way -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Trial]:
    return {kind: trial(strategy).perturb() for kind, (strategy, _) in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_video_is_a_function_of_its_row_and_goes_on_after_any_block(
    kind: str, runs: dict[str, Trial]
) -> None:
    run, long = runs[kind], KINDS[kind][1]
    sampler = sampler_of(run, long)
    blocks, states = [], [{}]
    for frames in sampler:
        blocks.append(frames)
        states.append(sampler.state())
    whole = torch.cat(blocks, dim=1)
    assert whole.shape == (1, 9, 3, SIZE, SIZE) and torch.isfinite(whole).all() and len(blocks) > 2
    both = video(run, long, rows=slice(0, 2))
    assert worst(both[:1], whole) < 1e-3 < worst(both[1:], whole)
    for done in (1, len(blocks) - 1):
        again = sampler_of(run, long)
        again.restore(states[done])
        assert torch.equal(torch.cat([*blocks[:done], *again], dim=1), whole), f"after block {done}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_does_not_grow(kind: str, runs: dict[str, Trial]) -> None:
    sizes = []
    sampler = sampler_of(runs[kind], KINDS[kind][1], 24)
    for _ in sampler:
        sizes.append(sum(tensor.numel() for tensor in sampler.state().values()))
    assert max(sizes[len(sizes) // 2 :]) <= max(sizes[:4])


def test_a_chunk_depends_on_its_prefix_and_the_first_one_on_nothing(runs: dict[str, Trial]) -> None:
    run = runs["chunks"]
    short, long = video(run, CHUNKS, 4), video(run, CHUNKS, 9)
    assert torch.equal(long[:, :4], short)
    sampler = sampler_of(run, CHUNKS)
    next(sampler)
    state = sampler.state()
    assert state["past.frames"].tolist() == [0, 2, 3], "frame 0 by the plan, and the last two"
    changed = sampler_of(run, CHUNKS)
    changed.restore({**state, "past": state["past"] + 1})
    assert worst(next(changed), next(sampler)) > 1e-3


# ---- the queue -----------------------------------------------------------------------------------------------------


def test_frames_of_the_queue_wait_and_then_take_every_step_once() -> None:
    assert [y.tolist() for y in steps_of(0, 4, 1, 4)] == [[1, 0, 0, 0], [True, True, False, False]]
    assert [y.tolist() for y in steps_of(3, 4, 6, 4)] == [[3, 2, 1, 0], [True] * 4]


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (ObjectiveConfig(), SamplerConfig(steps=5)),
        (ObjectiveConfig(kind="v"), SamplerConfig(steps=5, spacing="ddim", clip_x0=1.0)),
        (ObjectiveConfig(kind="flow", prediction="x0"), SamplerConfig(steps=5)),
        (ObjectiveConfig(kind="flow", shift=3.0), SamplerConfig(steps=5)),
    ],
)
def test_a_frame_that_takes_its_own_steps_ends_as_in_plain_sampling(
    objective: ObjectiveConfig, sampler: SamplerConfig
) -> None:
    """Each frame by itself, under a model that sees no other: the queue's order does not matter."""
    made, steps = make_objective(objective), FrameSteps(make_objective(objective), sampler)
    noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        return 0.5 * x + (timestep / 1000).reshape(*timestep.shape, *(1,) * (x.ndim - timestep.ndim))

    plain = sample(model, made, sampler, noise)
    x = noise
    for step in range(sampler.steps + 2):
        own, active = steps_of(0, 3, step, sampler.steps)
        active &= step - torch.arange(3) < sampler.steps
        own = own.expand(2, -1)
        x0 = steps.x0(model(x, made.timestep(steps.t(own))), x, own)
        after = steps.advance(x0, x, own, torch.Generator())
        x = torch.where(active.reshape(3, 1, 1, 1), after, x)
    assert worst(x, plain) < 1e-5


def test_a_queue_is_one_pass_at_every_window_and_sees_frames_before_it(runs: dict[str, Trial]) -> None:
    run = runs["diffusion_forcing"]
    seen: list[tuple[Tensor, tuple[int, ...]]] = []

    def note(_: object, given: tuple[Any, ...]) -> None:
        if given[3].clip is not None:  # else, the reference's own pass
            seen.append((given[1], tuple(given[3].clip.frames)))

    hook = run.model.backbone.register_forward_pre_hook(note)
    sampler = sampler_of(run, replace(QUEUE, window=2, prefix=1), steps=3)
    next(sampler)
    seen.clear()
    next(sampler)  # frames 2 and 3, the queue being 2, 3, 4
    hook.remove()
    passes = [(t[0].tolist(), frames) for t, frames in seen]
    times = [p for p, _ in passes]
    assert [frames for _, frames in passes][:3] == [(0, 1, 2), (0, 2, 3), (0, 3, 4)]
    assert times[0][:2] == [0, 0] and times[1][0] == times[2][0] == 0, "finished frames are clean"
    assert times[0][2] == times[1][1] < times[1][2] == times[2][1] < times[2][2], "noise rises in the queue"


def test_heun_has_no_steps_of_single_frames() -> None:
    with pytest.raises(ValueError, match=r"sampler\.kind is heun.*use euler"):
        FrameSteps(make_objective(ObjectiveConfig(kind="flow")), SamplerConfig(kind="heun"))


# ---- a start of moved latents --------------------------------------------------------------------------------------


def test_chunks_move_the_latents_of_frame_0_and_go_on_after_any_block(runs: dict[str, Trial]) -> None:
    warp = StartConfig(kind="warp", denoised=0.5, renoised=0.5, motion=(64.0, 0.0))
    run, steps = runs["chunks"], 4
    sampler = sampler_of(run, CHUNKS, steps=steps, start=warp)
    first, state, *rest = next(sampler), sampler.state(), *sampler
    again = sampler_of(run, CHUNKS, steps=steps, start=warp)
    again.restore(state)
    assert torch.equal(torch.cat(list(again), dim=1), torch.cat(rest, dim=1))
    whole = sampler_of(run, LongConfig(), frames=4, steps=steps, start=warp)
    assert torch.equal(next(whole), first), "the first chunk is a video of its own"
    still = sampler_of(run, CHUNKS, steps=steps, start=replace(warp, motion=(0.0, 0.0)))
    next(still)
    assert worst(next(still), rest[0]) > 1e-3, "later chunks move, too"


# ---- LVDM's hierarchy ----------------------------------------------------------------------------------------------


def test_predicted_frames_stay_when_others_are_put_between_them(runs: dict[str, Trial]) -> None:
    """data.frames is 3: the first clip is frames 0, 3 and 6 of the video, which end the clips between them."""
    run = runs["lvdm"]
    sparse, dense = video(run, replace(LVDM, interpolated=0), 3), video(run, LVDM, 7)
    assert worst(dense[:, ::3], sparse) < 1e-6
    assert video(run, LVDM, 8).shape[1] == 8 and video(run, LVDM, 1).shape[1] == 1
    assert worst(dense[:, 1], dense[:, 2]) > 1e-3
    other = replace(run.components, interpolator=trial("lvdm", "dit-interleaved").components)
    by_two = video(replace(run, components=other), LVDM, 7)
    assert torch.equal(by_two[:, ::3], dense[:, ::3]) and worst(by_two[:, 1], dense[:, 1]) > 1e-3, (
        "two models"
    )


def test_the_command_line_takes_a_run_that_interpolates(runs: dict[str, Trial], tmp_path: Path) -> None:
    for name, model in {"one": runs["lvdm"], "two": trial("lvdm", "dit-interleaved")}.items():
        Pipeline(**vars(model.components)).save(tmp_path / name)
    given = SampleArguments(
        run=str(tmp_path / "one"),
        long="lvdm",
        set=("sample.long.interpolated=4",),
        interpolator=str(tmp_path / "two"),
    )
    pipeline = load(given)
    assert pipeline.config.sample.long == LVDM and pipeline.interpolator is not None
    assert pipeline.interpolator.config.dit.layout == "interleaved" != pipeline.config.dit.layout
    with pytest.raises(ValueError, match=r"sample\.long\.interpolated 0; give --long lvdm"):
        load(replace(given, set=()))


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("long", "frames", "message"),
    [
        (CHUNKS, 2, r"frames is 2: the network sees 2, no more than the 2 of sample\.long\.prefix"),
        (replace(CHUNKS, window=0, prefix=3), 9, r"sample\.long\.prefix is 3, but a pass sees 3 frames"),
        (LVDM, 9, r"sample\.long\.kind is lvdm, but no active strategy tells the network"),
    ],
)
def test_what_cannot_be_is_one_error(
    long: LongConfig, frames: int, message: str, runs: dict[str, Trial]
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler_of(runs["chunks"], long, frames)


@pytest.mark.parametrize(("kind", "start"), [("diffusion_forcing", "warp"), ("chunks", "inversion")])
def test_a_start_of_whole_videos_is_refused(kind: str, start: Any, runs: dict[str, Trial]) -> None:
    with pytest.raises(ValueError, match=rf"start\.kind is {start}, but sample\.long\.kind is {kind}"):
        sampler_of(runs[kind], KINDS[kind][1], start=StartConfig(kind=start))


def test_what_the_training_never_saw_is_one_warning(
    runs: dict[str, Trial], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_timesteps.cache_clear()
    for _ in range(2):
        sampler_of(runs["chunks"], replace(CHUNKS, window=5))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(",")[0] for message in warnings] == [
        "sample.long.window is 5",
        "sample.long.kind chunks gives frames timesteps of their own",
    ]
    with pytest.raises(ValueError, match=r"sample\.long\.interpolated is 2; give at least 3"):
        LongConfig(interpolated=2)


# ---- whole videos --------------------------------------------------------------------------------------------------


def test_prompts_of_a_split_are_sampled_and_compared_at_any_length(
    runs: dict[str, Trial], tmp_path: Path
) -> None:
    components = runs["chunks"].components
    settings = SampleConfig(videos=1, batch_size=1, long=CHUNKS)
    components = replace(components, config=replace(components.config, sample=settings))
    requests = requests_of(components, settings, frames=9)
    cases = sample_prompts(components, settings, requests, tmp_path, Ranks(0, 1, torch.device("cpu")))
    (case,) = cases.values()
    assert case.truth is not None and len(case.video) == len(case.truth) == 9
    (short,) = requests_of(components, settings)
    assert short.truth is not None and len(short.truth) == components.config.data.frames == 3
    assert torch.equal(short.truth[-1], case.truth[-1]), "the same scene"


def test_generate_is_the_sampler_to_its_end(runs: dict[str, Trial]) -> None:
    run = runs["chunks"]
    options: Any = {"guidance": GuidanceConfig(scale=2.0), "sampler": SamplerConfig(steps=2, eta=1.0)}
    image = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    made = generate(
        run.components, image[:1], ["a dog runs"], ["dog"], [3], size=(9, SIZE, SIZE), long=CHUNKS, **options
    )
    assert torch.equal(made, video(run, CHUNKS))
