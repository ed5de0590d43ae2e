"""Temporal attention in overlapping windows whose results are averaged (FreeNoise, arXiv 2310.15169, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_booth.attention.joint_softmax import Segment, attend


@dataclass(frozen=True)
class WindowFusion:
    """Windows of `window` frames, one every `stride` frames, in which temporal attention works as it was trained."""

    window: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window:
            raise ValueError(
                f"stride is {self.stride} with a window of {self.window} frames; use 1 up to the window, or frames"
                " would lie in no window"
            )

    def starts(self, frames: int, *, released: bool = False) -> tuple[int, ...]:
        """Return the first frame of every window. The last window ends with the video, where the stride does not.

        released: without that window, as the released code has it: frames at the end may lie in no window.
        """
        last = frames - self.window
        starts = tuple(range(0, last + 1, self.stride)) if last >= 0 else ()
        if released or (starts and starts[-1] == last):
            return starts
        return (*starts, max(last, 0))


def triangle(count: int) -> Tensor:
    """Return a window's weights, 1 .. n/2, n/2 .. 1 (an odd n has one middle): `n`, int64."""
    at = torch.arange(count)
    return torch.minimum(at, count - 1 - at) + 1


def fuse(parts: Tensor, starts: Sequence[int], frames: int) -> Tensor:
    """Average the windows' results (b w n ...) frame by frame with `triangle` weights: (b f ...).

    A frame in no window is zero.
    """
    count = parts.shape[2]
    shape = (1, count, *[1] * (parts.ndim - 3))
    weights = triangle(count).to(parts).reshape(shape)
    total = parts.new_zeros(len(parts), frames, *parts.shape[3:])
    norm = parts.new_zeros(1, frames, *shape[2:])
    for start, part in zip(starts, parts.unbind(1), strict=True):
        total[:, start : start + count] += weights * part
        norm[:, start : start + count] += weights
    return total / norm.clamp_min(1)


def cut_windows(x: Tensor, starts: Sequence[int], count: int) -> Tensor:
    """Copy windows of `count` frames: (b f ...) -> (b w n ...)."""
    return torch.stack([x[:, start : start + count] for start in starts], dim=1)


def attend_in_windows(
    q: Tensor,
    segments: Sequence[Segment],
    fusion: WindowFusion,
    kernel: str = "auto",
    *,
    released: bool = False,
) -> Tensor:
    """Compute `attend` of queries (b 1 f k d) that form one group, in windows of the frames.

    The first segment has the frames' own keys and values (b 1 f k d) and is cut into windows; all of a further one is
    read in every window. released: `WindowFusion.starts`.
    """
    frames = q.shape[2]
    starts = fusion.starts(frames, released=released)
    if frames <= fusion.window:
        return attend(q, segments, kernel)

    def cut(x: Tensor) -> Tensor:
        return cut_windows(x[:, 0], starts, fusion.window)

    asked = [s if s.query is None else replace(s, query=cut(s.query)) for s in segments]
    own = replace(
        asked[0], k=cut(asked[0].k), v=cut(asked[0].v), frames=tuple((i,) for i in range(len(starts)))
    )
    others = [replace(s, frames=s.frames * len(starts)) for s in asked[1:]]
    return fuse(attend(cut(q), (own, *others), kernel), starts, frames).unsqueeze(1)
