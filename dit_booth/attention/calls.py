"""The kernel calls that a joint softmax takes, forward and backward, decided before any tensor exists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from operator import itemgetter

from dit_booth.attention.cover import Index, Read, compute_cover, is_whole
from dit_booth.attention.kernels.choice import Positions
from dit_booth.attention.plans import UNLIMITED_FRAMES, Frames
from dit_booth.attention.policy import Policy


class SizeClass(IntEnum):
    """Size of a segment's keys beside the queries: which of them are cheap to copy behind others."""

    TINY = 0  # the whole segment: Policy.join_below
    LIGHT = 1  # each of its groups: Policy.light_ratio
    LARGE = 2


@dataclass(frozen=True)
class KernelCall:
    """One call of a kernel: a read of one segment, perhaps with small keys of other segments joined to it.

    q, k, v: positions of the segment's query, keys and values in the list of tensors.
    """

    read: Read
    q: int
    k: int
    v: int
    scale: float
    joined: tuple[tuple[Index, int, int], ...] = ()
    """Small keys that the same block of frames also reads: (groups, position of k, position of v)."""
    light: bool = False
    """All frames read one group of a light segment."""
    fresh: bool = False
    """No earlier call has any of these frames, so there is no result to merge with."""


@dataclass(frozen=True)
class Calls:
    """The calls of the forward and of the backward pass, in order, and the policy they were made under."""

    forward: tuple[KernelCall, ...]
    backward: tuple[KernelCall, ...]
    compiled: bool
    """In a compiled graph, which may not know the sizes: process the whole batch, and all frames of a read, at once."""
    policy: Policy


def build_calls(
    frames: tuple[Frames, ...],
    positions: Positions,
    scales: tuple[float, ...],
    sizes: tuple[SizeClass, ...],
    max_frames: tuple[int, int] | None,
    policy: Policy,
) -> Calls:
    """Return the kernel calls for segments, those with most query frames first; later results are merged into theirs.

    frames, positions, scales, sizes: one entry for each segment.
    max_frames: query frames in one call, forward and backward, except where the first call covers all frames; None in a
    compiled graph: unlimited. A backward call reads no group twice. Tiny keys are joined to those of another call,
    light groups to light groups, and two groups that a single frame reads to each other.
    """
    forward_frames, backward_frames = max_frames or (UNLIMITED_FRAMES, UNLIMITED_FRAMES)
    count = len(frames[0])
    forward: list[KernelCall] = []
    for visibility, position, scale, size in sorted(
        zip(frames, positions, scales, sizes, strict=True), key=itemgetter(-1), reverse=True
    ):
        for read in compute_cover(visibility):
            light = size is SizeClass.LIGHT and count > 1 and read.area == count == len(read.queries[0])
            call = KernelCall(read, *position, scale, light=light)
            if light or size is SizeClass.TINY or read.area == 1:
                _join(forward, call)
            else:
                forward.append(call)
    forward.sort(key=lambda call: -call.read.frames)
    whole = is_whole(forward[0].read.queries, count)
    disjoint = [replace(call, read=read) for call in forward for read in call.read.split_overlaps()]
    forward = _split(forward, forward_frames, whole)
    backward = _split(disjoint, backward_frames, whole and disjoint[0].read == forward[0].read)
    return Calls(_mark_fresh(forward), tuple(backward), max_frames is None, policy)


def _split(calls: list[KernelCall], max_frames: int, keep_first: bool) -> list[KernelCall]:
    """Split calls into pieces of at most `max_frames` query frames, the first one only if not `keep_first`."""
    first = calls[: int(keep_first)]
    return first + [
        replace(call, read=piece) for call in calls[len(first) :] for piece in call.read.pieces(max_frames)
    ]


def _mark_fresh(calls: list[KernelCall]) -> tuple[KernelCall, ...]:
    marked, seen = [], set[int]()
    for call in calls:
        frames = {frame for row in call.read.queries for frame in row}
        marked.append(replace(call, fresh=seen.isdisjoint(frames)))
        seen |= frames
    return tuple(marked)


def _join(calls: list[KernelCall], small: KernelCall) -> None:
    """Join a call with few keys to one with the same block of frames, query and scale; without one, append it."""
    if len(small.read.queries) == 1:
        for i, call in enumerate(calls):
            same = (call.read.queries, call.q, call.scale) == (small.read.queries, small.q, small.scale)
            if same and call.light >= small.light:
                keys = (small.read.groups, small.k, small.v)
                calls[i] = replace(call, joined=(*call.joined, keys))
                return
    calls.append(small)
