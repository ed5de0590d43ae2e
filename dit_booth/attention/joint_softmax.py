"""`attend`: one exact joint softmax over segments, from flash kernels and log-sum-exp merging.

The visibility of a segment (which query frame reads which group) is cut into few *reads* (`reads.py`), each a plain
batched attention on views; `steps.py` says which calls of a kernel that makes. The partial results are merged by their
log-sum-exp. Backward runs each kernel's backward against the merged output and merged log-sum-exp (the identity behind
ring attention, Liu et al. 2023), so neither scores nor concatenated keys are ever stored. docs/attention.md has the
mathematics.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dit_booth.attention.calls import ALL, Plan, Step, Weight, plan_of
from dit_booth.attention.cover import Index, Read, add, is_view, is_whole, lay_back, lay_out, put, take
from dit_booth.attention.kernels.choice import Kernel, Positions, Whole, choose
from dit_booth.attention.plans import Frames, constant

COPY_BELOW = 2**18
"""Numbers in a sample below which slices of a batch are copied; above, its samples are attended one by one."""

PIECE = {"cpu": 2**21, "cuda": 3 * 2**20}
"""Numbers of queries in one call of a kernel whose results are merged or added to others and dropped: on the CPU they
fit its caches, on CUDA they fill the device."""

JOIN_BELOW = 96
"""Keys of a segment below which they are copied behind those of another segment that the same frames read in one block:
a token bank is cheaper to copy than to call a kernel for."""

LIGHT = 4
"""A group that every frame reads is light where all frames have so many times as many queries as it has keys. Two light
ones are copied behind each other and read in one call: two calls would merge results as large as the queries."""

MOST_PIECES = 3
"""On CUDA a read is cut into so many calls at most, backward only: launches cost, and a third of a gradient is little
memory."""

SHIFTS = ["cuda"]
"""Devices on which a read that is a shift of the whole batch is taken as one: it computes a few rows that nobody wants,
where other devices copy those that are wanted. CPUs copy as fast as they compute."""


@dataclass(frozen=True)
class Segment:
    """Keys and values in g groups, and which query frames read which of them.

    A segment may carry its own queries (a query projection learned for the image keys) and its own scale of the
    scores: the softmax is still joint.
    """

    k: Tensor  # b g m k d
    v: Tensor  # b g m k d
    frames: Frames
    query: Tensor | None = None  # b f n k d
    scale: float | None = None  # of this segment's scores, instead of `attend`'s


def attend(
    q: Tensor, segments: Sequence[Segment], kernel: str = "auto", scale: float | None = None
) -> Tensor:
    """Softmax attention of every query over every key that it may read, in all segments jointly.

    q: (b f n k d), scaled by d ** -0.5 unless `scale` says otherwise. Returns (b f n k d) in the widest dtype of the
    inputs, or autocast's.
    Raises ValueError where a query frame reads nothing, shapes disagree, or the kernel cannot take the tensors.
    """
    _validate(q, segments)
    head = operator.index(q.shape[-1])  # a constant where torch.compile would make it a symbol
    scale = head**-0.5 if scale is None else scale
    scales = tuple(scale if s.scale is None else s.scale for s in segments)
    frames = tuple(s.frames if s.k.shape[2] else ((),) * len(s.frames) for s in segments)
    positions = _positions(tuple(s.query is not None for s in segments))
    tensors = [q, *(s.query for s in segments if s.query is not None)]
    tensors += [t for s in segments for t in (s.k, s.v)]
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
    device = (
        "cpu" if q.is_meta else q.device.type
    )  # autocast knows no meta device, on which FLOPs are counted
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    chosen = choose(kernel, q.device, dtype, head, grad, _longest(q, segments))
    with torch.autocast(device, enabled=False):  # a kernel's float32 parts stay float32
        tensors = [t.to(dtype) for t in tensors]
        if len(segments) == 1 and segments[0].k.shape[2] == 1 and all(len(read) == 1 for read in frames[0]):
            # A softmax over one key is its value, whatever asks: queries and keys get no gradient.
            return take(tensors[-1], frames[0]).expand_as(q)
        if isinstance(chosen, Whole):
            return chosen.attend(tensors, positions, frames, scales)
        weights = tuple(_weight(q, s) for s in segments)
        number = _number((frames, positions, scales, weights, _most(q)), chosen)
        if chosen.traceable:
            return _joint_softmax(number, *tensors)
        out: Tensor = _Joint.apply(*_KEPT[number], *tensors)
        return out


def _validate(q: Tensor, segments: Sequence[Segment]) -> None:
    count = q.shape[1]
    for s in segments:
        if len(s.frames) != count:
            raise ValueError(f"a segment says what {len(s.frames)} query frames read, but there are {count}")
        if s.k.shape != s.v.shape or s.k.shape[-2:] != q.shape[-2:] or s.k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k {tuple(s.k.shape)} and v {tuple(s.v.shape)} do not fit q {tuple(q.shape)} (b f n k d)"
            )
        if s.query is not None and s.query.shape != q.shape:
            raise ValueError(
                f"a segment's own query {tuple(s.query.shape)} is not of q's shape {tuple(q.shape)}"
            )
        for i, groups in enumerate(s.frames):
            for g in (min(groups), max(groups)) if groups else ():
                if not 0 <= g < s.k.shape[1]:
                    raise ValueError(
                        f"query frame {i} reads group {g}, but the segment has {s.k.shape[1]}, counted from 0"
                    )
    for i in range(count):
        if not any(s.frames[i] and s.k.shape[2] for s in segments):
            raise ValueError(
                f"query frame {i} reads no key in any segment; give it at least one in the frame plan"
            )


def _keys(segment: Segment) -> int:
    return segment.k.shape[1] * segment.k.shape[2]


def _weight(q: Tensor, segment: Segment) -> Weight:
    """By branches: torch.compile, which may have symbols for lengths, guards those and has constants here."""
    if _keys(segment) < JOIN_BELOW:
        return Weight.FEW
    return Weight.LIGHT if LIGHT * segment.k.shape[2] <= q.shape[1] * q.shape[2] else Weight.HEAVY


def _longest(q: Tensor, segments: Sequence[Segment]) -> int:
    """No read has more queries than a sample's, nor more keys than all segments', which may be joined."""
    return max(q.shape[1] * q.shape[2], sum(_keys(s) for s in segments))


# ---- what is to be run: constants of a compiled graph -------------------------------------------------------

Planned = tuple[tuple[Frames, ...], Positions, tuple[float, ...], tuple[Weight, ...], tuple[int, int] | None]
"""What a plan is made from, in `plan_of`'s order."""


@constant
def _number(planned: Planned, kernel: Kernel) -> int:
    """What a compiled graph can hold of a plan and kernel: their number in `_KEPT`.

    torch.compile is told to take the softmax as it is: to trace it takes as long as all the rest of a block.
    """
    if planned[-1] is None and kernel.traceable:
        torch.compiler.allow_in_graph(_joint_softmax)
    return _keep(planned, kernel)


_KEPT: dict[int, tuple[Plan, Kernel]] = {}
_COUNT = count()


@cache
def _keep(planned: Planned, kernel: Kernel) -> int:
    number = next(_COUNT)
    _KEPT[number] = plan_of(*planned), kernel
    return number


def _positions(own: tuple[bool, ...]) -> Positions:
    """Positions among (q, own queries in order, k, v, k, v, ...)."""
    keys = 1 + sum(own)
    return tuple(
        (1 + sum(own[:i]) if has else 0, keys + 2 * i, keys + 2 * i + 1) for i, has in enumerate(own)
    )


def _most(q: Tensor) -> tuple[int, int] | None:
    """How many frames of queries PIECE is, forward and backward; None in a compiled graph.

    Of a batch of videos where shifts are taken no call is cut: a part of a shift has as many rows, nearly.
    """
    if torch.compiler.is_compiling():
        return None
    if len(q) > 1 and q.device.type in SHIFTS:
        return ALL, ALL
    piece = PIECE.get(q.device.type, PIECE["cuda"]) // max(1, q[0, 0].numel())
    on_cpu = q.device.type == "cpu"
    least = -(-torch.get_num_threads() // q.shape[3]) if on_cpu else -(-q.shape[1] // MOST_PIECES)
    most = max(piece, least, 1)
    return (most if on_cpu else ALL), most


# ---- the joint softmax -------------------------------------------------------------------------------------


def _joint_softmax(number: int, *tensors: Tensor) -> Tensor:
    """`_KEPT[number]` over `tensors`: q, the own queries in order, then k, v of every segment. Returns (b f n k d)."""
    out: Tensor = _Joint.apply(*_KEPT[number], *tensors)
    return out


class _Joint(torch.autograd.Function):
    """The joint softmax of a plan."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, kernel: Kernel, *tensors: Tensor) -> Tensor:
        parts = [_forward(plan, kernel, sample) for sample in _samples(plan, tensors)]
        out: Tensor
        out, lse = (_together(part) for part in zip(*parts, strict=True))
        ctx.plan, ctx.kernel = plan, kernel
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        samples = _samples(ctx.plan, (*ctx.saved_tensors, grads[0]))
        parts = [_backward(ctx.plan, ctx.kernel, needed, *sample) for sample in samples]
        return (None, None, *(_together(part) for part in zip(*parts, strict=True)))


def _shift(step: Step, tensors: Sequence[Tensor]) -> int:
    """How many frames a video has where the step's read is taken as a shift of the whole batch, else 0."""
    q, k = (tensors[i] for i in step.at[:2])
    if q.device.type not in SHIFTS or q.shape[1] != k.shape[1]:
        return 0
    return q.shape[1] if step.read.is_shift(q.shape[1]) else 0


def _samples(plan: Plan, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The batch as one, or sample by sample where blocks of it would have to be copied and are large."""
    q = tensors[0]
    if plan.at_once or len(q) == 1 or q[0].numel() < COPY_BELOW:
        return [tensors]
    if all(
        len(step.read.queries) == 1
        or _shift(step, tensors)
        or (
            is_whole(step.read.queries, q.shape[1])
            and is_whole(step.read.groups, tensors[step.at[1]].shape[1])
        )
        for step in plan.forward
    ):
        return [tensors]
    return [[t[i : i + 1] for t in tensors] for i in range(len(q))]


def _together(parts: Sequence[Any]) -> Any:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(list(parts))


def _forward(plan: Plan, kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output (b f n k d) and log-sum-exp (b f n k 1)."""
    q = tensors[0]
    out, lse = None, None
    for step in plan.forward:
        o, log = _partial(step, kernel, tensors)
        if out is None and is_whole(step.read.queries, q.shape[1]):
            out, lse = o.reshape(q.shape).contiguous(), log.reshape(*q.shape[:-1], 1)
            continue
        if out is None or lse is None:
            out, lse = torch.zeros_like(q), log.new_full((*q.shape[:-1], 1), -torch.inf)
        if step.fresh:
            put(out, step.read.queries, o)
            put(lse, step.read.queries, log)
        else:
            _merge(out, lse, step.read, o, log)
        del o, log  # before the next kernel runs: a read's result is as large as the output
    assert out is not None and lse is not None
    return out, lse


def _sources(step: Step) -> list[tuple[Index, int, int]]:
    """Groups of, and places of k and v, in the order of the keys."""
    _, k, v = step.at
    return [(step.read.groups, k, v), *step.joined]


def _keys_of(step: Step, tensors: Sequence[Tensor], shift: int) -> tuple[Tensor, Tensor]:
    """k and v as the kernel takes them; views, unless others are joined."""
    ks = [lay_out(tensors[i], groups, shift) for groups, i, _ in _sources(step)]
    vs = [lay_out(tensors[i], groups, shift) for groups, _, i in _sources(step)]
    return (ks[0], vs[0]) if len(ks) == 1 else (torch.cat(ks, dim=2), torch.cat(vs, dim=2))


def _partial(step: Step, kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    queries, shift = step.read.queries, _shift(step, tensors)
    q = lay_out(tensors[step.at[0]], queries, shift)
    out, lse = kernel.forward(q, *_keys_of(step, tensors, shift), step.scale)
    return lay_back(out, queries, shift), lay_back(lse.unsqueeze(-1), queries, shift)


def _merge(out: Tensor, lse: Tensor, read: Read, o: Tensor, log: Tensor) -> None:
    """Merge a partial softmax into (out, lse) in place: exact by log-sum-exp (docs/attention.md, equation 3)."""
    old, old_log = take(out, read.queries), take(lse, read.queries)
    old.lerp_(o, torch.sigmoid(log - old_log).to(o.dtype))
    put(lse, read.queries, torch.logaddexp(old_log, log))
    if not is_view(read.queries):
        put(out, read.queries, old)


def _backward(plan: Plan, kernel: Kernel, needed: Sequence[bool], *saved: Tensor) -> list[Tensor | None]:
    """Gradients of the tensors; `saved` are they, the merged output and log-sum-exp, and the output's gradient."""
    *tensors, out, lse, dout = saved
    sums = [_Sum(t) for t in tensors]
    for step in plan.backward:
        queries, shift = step.read.queries, _shift(step, tensors)
        g, q, o, log = (lay_out(t, queries, shift) for t in (dout, tensors[step.at[0]], out, lse))
        keys = _keys_of(step, tensors, shift)
        dq, dk, dv = kernel.backward(g, q, *keys, o, log.squeeze(-1), step.scale)
        parts = [(step.at[0], queries, dq)]
        sources = _sources(step)
        sizes = [len(groups[0]) * tensors[i].shape[2] for groups, i, _ in sources]
        for (groups, i, j), k, v in zip(sources, dk.split(sizes, 2), dv.split(sizes, 2), strict=True):
            parts += [(i, groups, k), (j, groups, v)]
        for i, index, part in parts:
            if needed[i]:
                sums[i].add(index, lay_back(part, index, shift))
        del keys, dq, dk, dv, parts, part, k, v  # before the next kernel runs
    return [total.end() if need else None for total, need in zip(sums, needed, strict=True)]


class _Sum:
    """The gradient of a tensor (b f n k d), from parts of its frames: the first part of a frame is written."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.total: Tensor | None = None
        self.left = set(range(like.shape[1]))  # frames that have none yet

    def add(self, index: Index, part: Tensor) -> None:
        frames = {i for row in index for i in row}
        if self.total is None and is_whole(index, self.like.shape[1]):
            self.total = part.reshape(self.like.shape)
        elif frames <= self.left:
            put(self._written(), index, part)
        else:
            self._clear(frames & self.left)
            add(self._written(), index, part)
        self.left -= frames

    def end(self) -> Tensor:
        """The sum; a frame that nothing reads has a gradient of zero."""
        self._clear(self.left)
        return self._written()

    def _written(self) -> Tensor:
        if self.total is None:
            self.total = torch.empty_like(self.like)
        return self.total

    def _clear(self, frames: set[int]) -> None:
        for i in frames:
            if i - 1 not in frames:  # a run begins
                self._written()[:, i : next(j for j in count(i) if j not in frames)].zero_()
