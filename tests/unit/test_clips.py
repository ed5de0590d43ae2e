"""Parts of a long video: plans by the indices of the whole video, cached past frames, and where the image reaches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_booth.strategies.channel_concat import ChannelConcatConfig
from dit_booth.strategies.decoupled_attention import DecoupledAttentionConfig
from dit_booth.strategies.elite import EliteLocalConfig
from dit_booth.strategies.in_context import InContextConfig
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.spatial_concat import SpatialConcatConfig
from dit_booth.strategies.token_bank import TokenBankConfig
from torch import Tensor

from dit_booth.attention import Clip, FrameCache, FramePlan, PrefixCache, Segment, attend
from dit_booth.inject import Latents, Reference
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.frames import FrameLayout
from dit_booth.models.unet.blocks import VideoNorm
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.wan.model import WanConfig
from dit_booth.testing import Trial, trial, worst

torch.set_num_threads(1)
F64, FRAMES = torch.float64, 9
PLANS = (
    "first+previous",
    "self+first",
    "window(3)",
    "sink(2)+window(2)",
    "keyframes(4)",
    "keyframes(3)+self",
)
CHUNKED = ("chunk(3)+past", "chunk(3)+sink(1)+window(4)")
CLIPS = ((0, 1, 2), (3, 4), (5, 6, 7, 8))


# ---- plans by index ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*PLANS, *CHUNKED, "all"])
def test_a_plan_by_indices_is_the_plan_of_the_whole_video(text: str) -> None:
    plan, every = FramePlan(text), range(FRAMES)
    assert plan.between(every, every) == plan.frames(FRAMES)
    keys = (0, 4, 5, 6, 8)
    for i, read in zip((5, 8), plan.between((5, 8), keys), strict=True):
        assert {keys[place] for place in read} == set(plan.frames(FRAMES)[i]) & set(keys)


@pytest.mark.parametrize("text", [*PLANS, *CHUNKED])
def test_what_is_kept_is_all_that_later_frames_read_of_the_past(text: str) -> None:
    plan = FramePlan(text)
    for start in range(1, 20):
        later = {j for i in range(start, start + 30) for j in plan.reads(i)}
        assert set(plan.kept(start)) == {j for j in later if j < start}


def test_frames_of_a_prefix_read_what_is_there_or_themselves() -> None:
    clip = Clip((0, 5, 6, 7))
    assert clip.visible(FramePlan("first+previous")) == ((0,), (0,), (0, 1), (0, 2))
    assert Clip((5, 6)).visible(FramePlan("first+previous")) == ((0,), (0,)), (
        "5 reads neither 0 nor 4: itself"
    )
    assert Clip((4, 5)).visible(FramePlan("keyframes(4)")) == ((0,), (0,)), "keyframe 4 by the whole video"
    assert clip.visible(FramePlan("all")) == ((0, 1, 2, 3),) * 4
    assert clip.positions(1) == (-1, 0, 5, 6, 7) and Clip(range(3)).positions(2) == range(-2, 3)


@pytest.mark.parametrize("frames", [(), (3, 2), (-1, 0), (2, 2)])
def test_indices_that_cannot_be(frames: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"clip\.frames is .*; give the frames' indices in the video, rising"
    ):
        Clip(frames)


# ---- the cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PLANS)
def test_attention_with_the_cache_equals_attention_over_the_whole_video(text: str) -> None:
    generator, plan = torch.Generator().manual_seed(0), FramePlan(text)
    q, k, v = (torch.randn(2, FRAMES, 3, 2, 4, generator=generator, dtype=F64) for _ in range(3))
    whole = attend(q, (Segment(k, v, plan.frames(FRAMES)),))
    cache, parts, held = FrameCache({"cross_frame": plan}), [], []
    for frames in CLIPS:
        rows, clip = slice(frames[0], frames[-1] + 1), Clip(frames, cache)
        own = Segment(k[:, rows], v[:, rows], clip.visible(plan))
        past = cache.extend("a", "cross_frame", own, frames)
        parts.append(attend(q[:, rows], (own, *past)))
        held.append(cache.elements)
    assert worst(torch.cat(parts, dim=1), whole) < 1e-12
    most = {"window(3)": 2, "sink(2)+window(2)": 3, "self+first": 1}.get(text, 2)
    assert max(held) <= most * k[:, 0].numel() * 2, "bounded by the plan"
    assert cache.extend("text", "text", own, frames) == ()


@pytest.mark.parametrize("text", CHUNKED)
def test_chunks_with_the_cache_equal_attention_over_the_whole_video(text: str) -> None:
    """A frame reads the later frames of its chunk: clips must end with a chunk, and so must a prefix."""
    plan = FramePlan(text)
    assert plan.frames(FRAMES)[3][-1] == 5 and (0 in plan.frames(FRAMES)[8]) and plan.causal
    q, k, v = torch.randn(3, 1, FRAMES, 2, 2, 4, dtype=F64)
    whole = attend(q, (Segment(k, v, plan.frames(FRAMES)),))
    cache, parts = FrameCache({"cross_frame": plan}), []
    for rows in (slice(0, 3), slice(3, 9)):
        frames = range(FRAMES)[rows]
        own = Segment(k[:, rows], v[:, rows], Clip(frames, cache).visible(plan))
        parts.append(attend(q[:, rows], (own, *cache.extend("a", "cross_frame", own, frames))))
    assert worst(torch.cat(parts, dim=1), whole) < 1e-12
    own = Segment(k[:, :2], v[:, :2], ((0, 1), (0, 1)))
    with pytest.raises(ValueError, match=r"frame 0 reads frame 2 under plan 'chunk\(3\)"):
        FrameCache({"cross_frame": plan}).extend("a", "cross_frame", own, (0, 1))
    with pytest.raises(
        ValueError, match=r"frame 0 reads frame 2 .* but the prefix ends at frame 1: let chunks"
    ):
        PrefixCache({"cross_frame": plan}, (0, 1)).extend("a", "cross_frame", own, (0, 1))


def test_a_frame_that_is_gone_and_a_plan_that_looks_ahead() -> None:
    own = Segment(*(torch.zeros(1, 2, 1, 1, 4) for _ in "kv"), ((0,), (0,)))
    cache = FrameCache({"cross_frame": FramePlan("window(4)")})
    with pytest.raises(
        ValueError, match=r"frame 5 reads frame 2 under plan 'window\(4\)', but the clip has .* 5 to 6"
    ):
        cache.extend("a", "cross_frame", own, (5, 6))
    with pytest.raises(ValueError, match="the clip begins at frame 1, but the cache has frame 1 already"):
        for _ in range(2):
            cache.extend("b", "cross_frame", own, (0, 1) if not cache.past else (1, 2))
    with pytest.raises(ValueError, match="plan 'self\\+all' reads frames that come later"):
        FrameCache({"cross_frame": FramePlan("self+all")})
    with pytest.raises(ValueError, match=r"frame 0 reads frame 2 under plan 'sink\(3\)'"):
        FrameCache({"cross_frame": FramePlan("sink(3)")}).extend("a", "cross_frame", own, (0, 1))


CAUSAL: dict[str, dict[str, Any]] = {
    "dit": {
        "dit": DiTConfig(depth=2, hidden=32, heads=2, plan="sink(1)+window(2)", temporal_plan="window(3)")
    },
    "dit-rotary": {
        "dit": DiTConfig(
            depth=2,
            hidden=32,
            heads=2,
            plan="keyframes(4)+self",
            temporal_plan="first+window(2)",
            positions="rotary",
        )
    },
    "unet": {
        "backbone": "unet",
        "unet": UNetConfig(
            channels=(8, 16),
            norm_groups=4,
            heads=1,
            layers_per_block=1,
            down_attention=(False, True),
            plan="first+previous",
            temporal_plan="window(3)",
            positions="rotary",
        ),
    },
    "wan": {
        "backbone": "wan",
        "wan": WanConfig(depth=2, hidden=32, heads=2, ffn=64, plan="sink(1)+window(3)"),
    },
}


def in_float64(
    strategy: str, settings: dict[str, Any], options: dict[str, Any]
) -> tuple[Trial, Tensor, Reference]:
    run = trial(strategy, **settings, options=options).perturb()
    run.model.double()
    x = torch.randn(2, FRAMES, *run.x.shape[2:], generator=torch.Generator().manual_seed(1), dtype=F64)
    reference = run.reference()
    assert reference.noisy is not None
    doubled = replace(
        reference,
        states=tuple(s.double() for s in reference.states),
        embedding=reference.embedding.double(),
        latent=reference.latent.double(),
        noisy=reference.noisy.double(),
    )
    return run, x, doubled


def frame_by_frame(self: VideoNorm, x: Tensor, context: int = 0) -> Tensor:
    return torch.nn.GroupNorm.forward(self, x.flatten(0, 1)).reshape(x.shape)


KEYFRAMES: dict[str, Any] = {"reference_at": "keyframes", "keyframe_every": 4}


@pytest.mark.parametrize(
    ("backbone", "strategy", "options"),
    [
        ("dit", "kv_concat+token_bank", {"kv_concat": KVConcatConfig(**KEYFRAMES)}),
        ("dit-rotary", "kv_concat", {"kv_concat": KVConcatConfig(update="direct", **KEYFRAMES)}),
        ("dit", "in_context", {"in_context": InContextConfig(**KEYFRAMES)}),
        ("dit-rotary", "decoupled_attention", {"decoupled_attention": DecoupledAttentionConfig(**KEYFRAMES)}),
        ("wan", "kv_concat", {"kv_concat": KVConcatConfig(update="direct", **KEYFRAMES)}),
        ("wan", "in_context", {}),
        ("unet", "kv_concat", {}),
        ("unet", "spatial_concat", {"spatial_concat": SpatialConcatConfig(**KEYFRAMES)}),
    ],
)
@torch.no_grad()
def test_clips_with_the_cache_equal_the_whole_video(
    backbone: str, strategy: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every backbone, float64; the U-Net with norms of single frames, as its own pool what a clip lacks."""
    monkeypatch.setattr(VideoNorm, "forward", frame_by_frame)
    run, x, reference = in_float64(strategy, CAUSAL[backbone], options)
    whole = run.model(x, run.t, run.prompt, reference).output
    cache = run.model.backbone.make_frame_cache()
    parts = [
        run.model(x[:, list(frames)], run.t, run.prompt, reference, clip=Clip(frames, cache)).output
        for frames in CLIPS
    ]
    assert worst(torch.cat(parts, dim=1), whole) < 1e-10
    apart = run.model(x[:, list(CLIPS[2])], run.t, run.prompt, reference, clip=Clip(CLIPS[2])).output
    assert worst(apart, whole[:, list(CLIPS[2])]) > 1e-4, "the past matters"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DiTConfig(depth=1, hidden=32, heads=2),
            "temporal_plan is all: temporal attention reads later frames",
        ),
        (
            DiTConfig(depth=1, hidden=32, heads=2, layout="joint", plan="all"),
            "plan 'all' reads frames that come later",
        ),
        (
            DiTConfig(depth=1, hidden=32, heads=2, temporal_plan="window(2)", conditioning="in_context"),
            "dit.conditioning is in_context: the text reads every frame",
        ),
    ],
)
def test_backbones_whose_past_depends_on_the_future_have_no_cache(config: DiTConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trial("none", dit=config).model.backbone.make_frame_cache()


def test_a_clip_of_another_length_and_a_reference_that_reads_the_video() -> None:
    run, plan = (
        trial("in_context", options={"in_context": InContextConfig(one_way=False)}),
        FramePlan("previous"),
    )
    with pytest.raises(ValueError, match=r"clip\.frames has 2 indices for 3 frames"):
        run.model(run.x, run.t, run.prompt, run.reference(), clip=Clip((4, 5)))
    latents = Latents(torch.zeros(1, 3, 1, 2, 2), context=1, one_way=False, clip=Clip((0, 1), FrameCache({})))
    with pytest.raises(ValueError, match=r"in_context\.one_way is false: the reference reads the video"):
        FrameLayout.build(latents, plan, plan)


# ---- where the image reaches ---------------------------------------------------------------------------------------

ANCHORED = {
    "channel_concat": ChannelConcatConfig,
    "kv_concat": KVConcatConfig,
    "decoupled_attention": DecoupledAttentionConfig,
    "elite_local": EliteLocalConfig,
    "token_bank": TokenBankConfig,
    "in_context": InContextConfig,
    "spatial_concat": SpatialConcatConfig,
}
ALONE: dict[str, Any] = {  # frames that nothing but the image connects
    "dit": DiTConfig(depth=1, hidden=32, heads=2, layout="image", plan="self", conditioning="cross_attention")
}


@pytest.mark.parametrize("name", ANCHORED)
@torch.no_grad()
def test_the_image_reaches_the_frames_that_reference_at_names(name: str) -> None:
    """Among frames that read only themselves, exactly the anchored ones depend on the image, in clips as in whole."""
    for at, reached in (("first", {0}), ("keyframes", {0, 4, 8}), ("all", set(range(FRAMES)))):
        options = {name: ANCHORED[name](reference_at=at, keyframe_every=4)}
        run = trial(name, **ALONE, options=options).perturb()
        x = torch.randn(2, FRAMES, *run.x.shape[2:], generator=torch.Generator().manual_seed(1))

        def predict(seed: int, frames: tuple[int, ...], run: Trial = run, x: Tensor = x) -> Tensor:
            clip = Clip(frames)
            out: Tensor = run.model(
                x[:, list(frames)], run.t, run.prompt, run.reference(seed), clip=clip
            ).output
            return out

        for frames in (tuple(range(FRAMES)), (3, 4, 5), (0, 7, 8)):
            change = (predict(1, frames) - predict(2, frames)).abs().amax(dim=(0, 2, 3, 4))
            assert {i for i, c in zip(frames, change.tolist(), strict=True) if c > 0} == reached & set(frames)


@pytest.mark.parametrize("name", ANCHORED)
def test_places_that_cannot_be(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"{name}\.reference_at is 'last'; choose one of first, keyframes, all"
    ):
        ANCHORED[name](reference_at="last")  # type: ignore[operator]
    with pytest.raises(
        ValueError, match=rf"{name}\.keyframe_every is 0; use a whole number in \[1, 100000\]"
    ):
        ANCHORED[name](keyframe_every=0)  # type: ignore[operator]
