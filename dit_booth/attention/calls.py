"""Steps: which calls of a kernel a joint softmax takes, forward and backward, before any tensor is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from operator import itemgetter

from dit_booth.attention.cover import Index, Read, is_whole, reads
from dit_booth.attention.kernels.choice import Positions
from dit_booth.attention.plans import Frames

ALL = 1 << 30
"""More frames than any video has."""


class Weight(IntEnum):
    """Of a segment's keys, beside the queries: whether and when to copy them behind others is cheap."""

    FEW = 0  # all of them, JOIN_BELOW
    LIGHT = 1  # each group of them, LIGHT
    HEAVY = 2


@dataclass(frozen=True)
class Step:
    """A read of one segment; `at` says where its query, k and v stand among the tensors."""

    read: Read
    at: tuple[int, int, int]
    scale: float
    joined: tuple[tuple[Index, int, int], ...] = ()
    """Few keys that the same block of frames reads too: their groups, and where k and v stand."""
    light: bool = False
    """All frames read this one group of a light segment."""
    fresh: bool = False
    """No step before it has any of its frames: there is no result to merge its own with."""


@dataclass(frozen=True)
class Plan:
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    at_once: bool
    """Of a compiled graph, which may not know the sizes: the whole batch, and all frames of a read."""


def plan_of(
    frames: tuple[Frames, ...],
    positions: Positions,
    scales: tuple[float, ...],
    weights: tuple[Weight, ...],
    most: tuple[int, int] | None,
) -> Plan:
    """Every plain attention to run, those of most query frames first: into the first one's result go the others.

    A call of a kernel takes `most` query frames, forward and backward, unless its result is the first and whole (None:
    it takes all); a backward takes no group twice. Few keys are joined to others, light ones to light ones, and so are
    two groups that one frame alone reads: all are little beside a video.
    """
    forward_most, backward_most = most or (ALL, ALL)
    count = len(frames[0])
    forward: list[Step] = []
    for f, at, scale, weight in sorted(
        zip(frames, positions, scales, weights, strict=True), key=itemgetter(-1), reverse=True
    ):
        for read in reads(f):
            light = weight is Weight.LIGHT and count > 1 and read.area == count == len(read.queries[0])
            step = Step(read, at, scale, light=light)
            if light or weight is Weight.FEW or read.area == 1:
                _join(forward, step)
            else:
                forward.append(step)
    forward.sort(key=lambda step: -step.read.frames)
    whole = is_whole(forward[0].read.queries, count)
    apart = [replace(step, read=read) for step in forward for read in step.read.apart()]
    forward = _cut(forward, forward_most, whole)
    backward = _cut(apart, backward_most, whole and apart[0].read == forward[0].read)
    return Plan(_marked(forward), tuple(backward), most is None)


def _cut(steps: list[Step], most: int, whole: bool) -> list[Step]:
    """The steps in pieces of `most` query frames; whole: but for the first one."""
    first = steps[: int(whole)]
    return first + [
        replace(step, read=piece) for step in steps[len(first) :] for piece in step.read.pieces(most)
    ]


def _marked(steps: list[Step]) -> tuple[Step, ...]:
    """The steps in order, with what is fresh told."""
    marked, seen = [], set[int]()
    for step in steps:
        its = {frame for row in step.read.queries for frame in row}
        marked.append(replace(step, fresh=seen.isdisjoint(its)))
        seen |= its
    return tuple(marked)


def _join(steps: list[Step], small: Step) -> None:
    """Add a read of few keys: to a step of the same block of frames with the same queries, or as one of its own."""
    if len(small.read.queries) == 1:
        for i, step in enumerate(steps):
            same = (step.read.queries, step.at[0], step.scale)
            if same == (small.read.queries, small.at[0], small.scale) and step.light >= small.light:
                more = (small.read.groups, *small.at[1:])
                steps[i] = replace(step, joined=(*step.joined, more))
                return
    steps.append(small)
