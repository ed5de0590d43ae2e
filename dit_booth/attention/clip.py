"""A clip: the frames of a long video that one pass computes, and the keys and values of earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from dit_booth.attention.joint_softmax import Segment
from dit_booth.attention.plans import FramePlan, Frames
from dit_booth.attention.window_fusion import WindowFusion

FrameIndices = range | tuple[int, ...]
"""Indices of frames in the whole video, rising."""


class FrameCache:
    """Keys and values of past frames at every site, as many as later frames may read under the site's plan.

    Clips must come in order, each beginning where the one before ended, at one noise level: a cache for each sampling
    step. Then attention with the cache equals attention over the whole video, because no frame reads later ones.

    Args:
        plans: the plan of each kind of site (its role): ``{"cross_frame": plan, "temporal": temporal_plan}``. Sites of
            other roles (text) have no past frames.

    Raises:
        ValueError: a plan reads later frames (`all`).
    """

    def __init__(self, plans: Mapping[str, FramePlan]) -> None:
        self.plans = dict(plans)
        self.past: dict[str, tuple[tuple[int, ...], Tensor, Tensor]] = {}
        """Site -> frames, and their keys and values (b g m k d)."""
        for plan in plans.values():
            plan.reads(0)

    @property
    def elements(self) -> int:
        """Number of elements held: it does not grow with the video."""
        return sum(k.numel() + v.numel() for _, k, v in self.past.values())

    def extend(self, site: str, role: str, own: Segment, frames: Sequence[int]) -> tuple[Segment, ...]:
        """Return the segment of past frames that the clip's frames read, if there is one, and keep the clip's own.

        own: the clip's keys and values; groups before the last ``len(frames)`` are outside the video and not kept.
        ValueError: a frame reads one that is neither in the clip nor kept.
        """
        plan = self.plans.get(role)
        if plan is None:
            return ()
        past, k, v = self.past.get(site, ((), own.k[:, :0], own.v[:, :0]))
        context = len(own.frames) - len(frames)
        self._check(plan, frames, past)
        kept = plan.kept(frames[-1] + 1)
        every = (*past, *frames)
        places = [every.index(frame) for frame in kept if frame in every]
        held_k, held_v = (
            torch.cat([old, new[:, context:]], dim=1)[:, places] for old, new in ((k, own.k), (v, own.v))
        )
        self.past[site] = tuple(every[place] for place in places), held_k, held_v
        read = ((),) * context + plan.between(frames, past)
        return (Segment(k, v, read),) if any(read) else ()

    def reaches(self, plan: FramePlan, frame: int) -> bool:
        """Return True if a frame of a clip reads past frames that are here."""
        return True  # or it is an error (`extend`)

    def _check(self, plan: FramePlan, frames: Sequence[int], past: Sequence[int]) -> None:
        if past and frames[0] <= past[-1]:
            raise ValueError(
                f"the clip begins at frame {frames[0]}, but the cache has frame {past[-1]} already; pass every frame"
                " once"
            )
        here = {*frames, *past}
        for frame in frames:
            missing = [j for j in plan.reads(frame) if j not in here]
            if missing:
                raise ValueError(
                    f"frame {frame} reads frame {missing[0]} under plan {plan.text!r}, but the clip has frames"
                    f" {frames[0]} to {frames[-1]} and the cache {list(past)}; make clips longer, and pass"
                    " them in order"
                )


class PrefixCache(FrameCache):
    """Keys and values of a prefix: past frames that one pass computes, and that passes over later frames read.

    The first pass is that of the prefix, the further ones, any number, are of frames after it, and change nothing. Then
    a pass equals the one over prefix and frames together. Frames that the prefix lacks are not read.

    Args:
        plans: as those of `FrameCache`.
        prefix: the prefix's frames.
    """

    def __init__(self, plans: Mapping[str, FramePlan], prefix: Sequence[int]) -> None:
        super().__init__(plans)
        self.prefix = tuple(prefix)

    def extend(self, site: str, role: str, own: Segment, frames: Sequence[int]) -> tuple[Segment, ...]:
        """Keep the keys and values in the prefix's pass; return the segment that later frames read, if there is one."""
        plan = self.plans.get(role)
        if plan is None:
            return ()
        context = len(own.frames) - len(frames)
        if site not in self.past:
            assert tuple(frames) == self.prefix, "the first pass is that of the prefix"
            self._check_ends(plan)
            self.past[site] = self.prefix, own.k[:, context:], own.v[:, context:]
            return ()
        _, k, v = self.past[site]
        read = ((),) * context + plan.between(frames, self.prefix)
        return (Segment(k, v, read),) if any(read) else ()

    def _check_ends(self, plan: FramePlan) -> None:
        last = self.prefix[-1]
        for frame in self.prefix:
            if (latest := plan.reads(frame)[-1]) > last:
                raise ValueError(
                    f"frame {frame} reads frame {latest} under plan {plan.text!r}, but the prefix ends at frame {last}:"
                    " let chunks of a video and their prefix (sample.long) be multiples of the plan's chunk"
                )

    def reaches(self, plan: FramePlan, frame: int) -> bool:
        return frame not in self.prefix and bool(plan.between((frame,), self.prefix)[0])


class Riflex(NamedTuple):
    """Rotary time for more frames than the training had (RIFLEx, arXiv 2502.15894, section 4)."""

    trained: int  # frames of a training video: after about as many, the video begins to repeat
    length: int  # frames of the video


@dataclass(frozen=True)
class Clip:
    """The frames of a pass by their indices in the video, rising: plans, positions and anchors follow the video.

    Without a cache the frames read one another as far as the plan says; one that reads none of them reads itself. So
    the frames may be a clean prefix that the plan reads (`FramePlan.kept`), such as 0 and 11, and new ones, 12 to 19.
    A whole video is ``Clip(range(f))``.
    """

    frames: FrameIndices
    cache: FrameCache | None = field(default=None, compare=False)
    fusion: WindowFusion | None = None  # of temporal attention, for videos longer than those of the training
    riflex: Riflex | None = None  # of the rotary time, likewise

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.frames, self.frames[1:], strict=False))
        if not self.frames or self.frames[0] < 0 or not rising:
            raise ValueError(
                f"clip.frames is {self.frames}; give the frames' indices in the video, rising from 0 or more"
            )

    def visible(self, plan: FramePlan) -> Frames:
        """Return the frames of the clip that each of its frames reads, as positions in the clip."""
        read, cache = plan.between(self.frames, self.frames), self.cache
        return tuple(
            places or (() if cache is not None and cache.reaches(plan, frame) else (i,))
            for i, (frame, places) in enumerate(zip(self.frames, read, strict=True))
        )

    def positions(self, context: int) -> FrameIndices:
        """Return the positions of the frames, after those of a context, which has negative ones."""
        if context == 0:
            return self.frames
        if isinstance(self.frames, range) and self.frames.start == 0:
            return range(-context, len(self.frames))
        return (*range(-context, 0), *self.frames)
