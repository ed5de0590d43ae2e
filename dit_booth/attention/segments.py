"""`attend`: one exact joint softmax over segments, from flash kernels and log-sum-exp merging.

The visibility of a segment (which query frame reads which group) is cut into few *reads* (`reads.py`), each a plain
batched attention on views. The partial results are merged by their log-sum-exp. Backward runs each kernel's backward
against the merged output and merged log-sum-exp (the identity behind ring attention, Liu et al. 2023), so neither
scores nor concatenated keys are ever stored. docs/attention.md has the mathematics.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import count
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from dit_booth.attention.kernels import Kernel, Positions, Whole, choose
from dit_booth.attention.plans import Frames, constant
from dit_booth.attention.reads import Index, Read, add, is_view, is_whole, lay_back, lay_out, put, reads, take

COPY_BELOW = 2**18
"""Numbers in a sample below which slices of a batch are copied; above, its samples are attended one by one."""

PIECE = {"cpu": 2**21, "cuda": 3 * 2**20}
"""Numbers of queries in one call of a kernel whose results are merged or added to others and dropped: on the CPU they
fit its caches, on CUDA they fill the device."""

JOIN_BELOW = 96
"""Keys of a segment below which they are copied behind those of another segment that the same frames read in one block:
a token bank is cheaper to copy than to call a kernel for."""

MOST_PIECES = 3
"""On CUDA a read is cut into so many calls at most, backward only: launches cost, and a third of a gradient is little
memory."""

ALL = 1 << 30
"""More frames than any video has."""


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
        # By branches: torch.compile, which may have symbols for lengths, guards those and has constants here.
        few = tuple(True if _keys(s) < JOIN_BELOW else False for s in segments)  # noqa: SIM210
        number = _number((frames, positions, scales, few, _most(q)), chosen)
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


def _longest(q: Tensor, segments: Sequence[Segment]) -> int:
    """No read has more queries than a sample's, nor more keys than all segments', which may be joined."""
    return max(q.shape[1] * q.shape[2], sum(_keys(s) for s in segments))


# ---- what is to be run: constants of a compiled graph -------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A read of one segment; `at` says where its query, k and v stand among the tensors."""

    read: Read
    at: tuple[int, int, int]
    scale: float
    joined: tuple[tuple[Index, int, int], ...] = ()
    """Few keys that the same block of frames reads too: their groups, and where k and v stand."""
    fresh: bool = False
    """No step before it has any of its frames: there is no result to merge its own with."""


@dataclass(frozen=True)
class Plan:
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    at_once: bool
    """Of a compiled graph, which may not know the sizes: the whole batch, and all frames of a read."""


Planned = tuple[tuple[Frames, ...], Positions, tuple[float, ...], tuple[bool, ...], tuple[int, int] | None]
"""What a plan is made from, in `_compile`'s order."""


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
    _KEPT[number] = _compile(*planned), kernel
    return number


def _compile(
    frames: tuple[Frames, ...],
    positions: Positions,
    scales: tuple[float, ...],
    few: tuple[bool, ...],
    most: tuple[int, int] | None,
) -> Plan:
    """Every plain attention to run, those of most query frames first: into the first one's result go the others.

    A call of a kernel takes `most` query frames, forward and backward, unless its result is the first and whole (None:
    it takes all); a backward takes no group twice. `few` are segments of few keys. They are joined to others, and so
    are two groups that one frame alone reads: both are little beside a video.
    """
    forward_most, backward_most = most or (ALL, ALL)
    forward: list[Step] = []
    for f, at, scale, small in sorted(zip(frames, positions, scales, few, strict=True), key=itemgetter(-1)):
        for read in reads(f):
            step = Step(read, at, scale)
            if small or read.area == 1:
                _join(forward, step)
            else:
                forward.append(step)
    forward.sort(key=lambda step: -step.read.frames)
    backward = [
        replace(step, read=piece)
        for step in forward
        for read in step.read.apart()
        for piece in read.pieces(backward_most)
    ]
    first = forward[:1] if is_whole(forward[0].read.queries, len(frames[0])) else []
    rest = [
        replace(step, read=piece)
        for step in forward[len(first) :]
        for piece in step.read.pieces(forward_most)
    ]
    return Plan(_marked([*first, *rest]), tuple(backward), most is None)


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
            if same == (small.read.queries, small.at[0], small.scale):
                more = (small.read.groups, *small.at[1:])
                steps[i] = replace(step, joined=(*step.joined, more))
                return
    steps.append(small)


def _positions(own: tuple[bool, ...]) -> Positions:
    """Positions among (q, own queries in order, k, v, k, v, ...)."""
    keys = 1 + sum(own)
    return tuple(
        (1 + sum(own[:i]) if has else 0, keys + 2 * i, keys + 2 * i + 1) for i, has in enumerate(own)
    )


def _most(q: Tensor) -> tuple[int, int] | None:
    """How many frames of queries PIECE is, forward and backward; None in a compiled graph."""
    if torch.compiler.is_compiling():
        return None
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


def _samples(plan: Plan, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The batch as one, or sample by sample where blocks of it would have to be copied and are large."""
    q = tensors[0]
    if plan.at_once or len(q) == 1 or q[0].numel() < COPY_BELOW:
        return [tensors]
    if all(
        len(step.read.queries) == 1
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


def _keys_of(step: Step, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """k and v as the kernel takes them; views, unless others are joined."""
    ks = [lay_out(tensors[i], groups) for groups, i, _ in _sources(step)]
    vs = [lay_out(tensors[i], groups) for groups, _, i in _sources(step)]
    return (ks[0], vs[0]) if len(ks) == 1 else (torch.cat(ks, dim=2), torch.cat(vs, dim=2))


def _partial(step: Step, kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    queries = step.read.queries
    out, lse = kernel.forward(lay_out(tensors[step.at[0]], queries), *_keys_of(step, tensors), step.scale)
    return lay_back(out, queries), lay_back(lse.unsqueeze(-1), queries)


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
    grads: list[Tensor | None] = [None] * len(tensors)
    for step in plan.backward:
        queries = step.read.queries
        dq, dk, dv = kernel.backward(
            lay_out(dout, queries),
            lay_out(tensors[step.at[0]], queries),
            *_keys_of(step, tensors),
            lay_out(out, queries),
            lay_out(lse, queries).squeeze(-1),
            step.scale,
        )
        parts = [(step.at[0], queries, dq)]
        sources = _sources(step)
        sizes = [len(groups[0]) * tensors[i].shape[2] for groups, i, _ in sources]
        for (groups, i, j), k, v in zip(sources, dk.split(sizes, 2), dv.split(sizes, 2), strict=True):
            parts += [(i, groups, k), (j, groups, v)]
        for i, index, part in parts:
            if needed[i]:
                grads[i] = _accumulate(grads[i], tensors[i], index, lay_back(part, index))
        del dq, dk, dv, parts, part, k, v  # before the next kernel runs
    return [
        torch.zeros_like(t) if grad is None and need else grad
        for t, grad, need in zip(tensors, grads, needed, strict=True)
    ]


def _accumulate(total: Tensor | None, like: Tensor, index: Index, part: Tensor) -> Tensor:
    if total is not None:
        add(total, index, part)
        return total
    if is_whole(index, like.shape[1]):
        return part.reshape(like.shape)
    total = torch.zeros_like(like)
    put(total, index, part)
    return total
