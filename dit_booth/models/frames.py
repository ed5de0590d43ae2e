"""Frames of a pass as all backbones lay them out: their positions, and which ones each reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dit_booth.attention import Clip, FrameCache, FrameIndices, FramePlan, Frames
from dit_booth.attention.plans import seen_by_all, with_context
from dit_booth.inject import Latents, Site


class FrameLayout(NamedTuple):
    """Visibilities and positions of a pass's frames, those of a context first, at positions below 0."""

    plan: Frames  # of attn1
    temporal_plan: Frames | None  # of attn_temp; none: every frame reads every frame
    positions: FrameIndices
    clip: Clip

    @classmethod
    def build(cls, latents: Latents, plan: FramePlan, temporal_plan: FramePlan | None) -> FrameLayout:
        """Lay out the frames of `latents` (`temporal_plan` None: `all`). ValueError: a clip of another length."""
        context, count = latents.context, latents.x.shape[1] - latents.context
        clip = latents.clip or Clip(range(count))
        if len(clip.frames) != count:
            raise ValueError(
                f"clip.frames has {len(clip.frames)} indices for {count} frames; give one for each"
            )
        if clip.cache is not None and context and not latents.one_way:
            raise ValueError(
                "in_context.one_way is false: the reference reads the video, so keys and values of past frames would"
                " change with later ones; set it to true, or sample without a cache"
            )
        across, in_time = clip.visible(plan), None if temporal_plan is None else clip.visible(temporal_plan)
        if context:
            one_way, readers = latents.one_way, latents.context_readers
            across = with_context(across, context, one_way, readers)
            if in_time is not None or one_way or readers is not None:
                in_time = with_context(in_time or seen_by_all(count, count), context, one_way, readers)
        if clip.fusion is not None and in_time is not None:
            raise ValueError(
                "windows of temporal attention (freenoise) need temporal_plan all, and no reference before the video"
                " (in_context); choose another plan or strategy, or another way to sample long videos"
            )
        return cls(across, in_time, clip.positions(context), clip)


def make_frame_cache(sites: Sequence[Site], plan: FramePlan, temporal_plan: FramePlan | None) -> FrameCache:
    """Return an empty cache for one noise level of a backbone with these sites and plans.

    ValueError: a plan reads later frames.
    """
    temporal = any(site.role == "temporal" for site in sites)
    if temporal and temporal_plan is None:
        raise ValueError(
            "temporal_plan is all: temporal attention reads later frames, which a video made in parts does not have"
            " yet; set it to a plan such as window(8), in training too"
        )
    plans = {"cross_frame": plan}
    return FrameCache({**plans, "temporal": temporal_plan} if temporal and temporal_plan else plans)
