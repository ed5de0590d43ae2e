"""`attend`: one exact joint softmax over segments, from flash kernels and log-sum-exp merging.

The visibility of a segment (which query frame reads which group) is covered with few *reads* (`cover.py`), each a plain
batched attention on views; `calls.py` lists the kernel calls for them. The partial results are merged by their
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
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dit_booth.attention.calls import Calls, KernelCall, SizeClass, build_calls
from dit_booth.attention.cover import Index, Read, add, is_view, is_whole, lay_back, lay_out, put, take
from dit_booth.attention.kernels.choice import JointKernel, Kernel, Positions, choose_kernel
from dit_booth.attention.plans import UNLIMITED_FRAMES, Frames
from dit_booth.attention.policy import OTHER, POLICIES, Policy
from dit_booth.attention.tracing import allow_in_graph, constant


@dataclass(frozen=True)
class Segment:
    """Keys and values in g groups, and the groups that each query frame reads.

    A segment may carry its own queries (a query projection learned for the image keys) and its own scale of the
    scores: the softmax is still joint.
    """

    k: Tensor  # b g m k d
    v: Tensor  # b g m k d
    frames: Frames
    query: Tensor | None = None  # b f n k d
    scale: float | None = None  # of this segment's scores, instead of `attend`'s


def attend(
    q: Tensor,
    segments: Sequence[Segment],
    kernel: str = "auto",
    scale: float | None = None,
    policy: Policy | None = None,
) -> Tensor:
    """Compute softmax attention of every query over all keys that it may read, jointly over the segments.

    q: (b f n k d). scale: of the scores; default d ** -0.5. policy: tuning; default by device (`policy.py`).
    Returns (b f n k d) in the widest dtype of the inputs, or autocast's.
    Raises ValueError if a query frame reads nothing, shapes disagree, or the kernel does not support the tensors.
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
    device = "cpu" if q.is_meta else q.device.type  # autocast has no meta device, on which FLOPs are counted
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    chosen = choose_kernel(kernel, q.device, dtype, head, grad, _longest(q, segments))
    with torch.autocast(device, enabled=False):  # a kernel's float32 parts stay float32
        tensors = [t.to(dtype) for t in tensors]
        if len(segments) == 1 and segments[0].k.shape[2] == 1 and all(len(read) == 1 for read in frames[0]):
            # A softmax over one key is its value: queries and keys get no gradient.
            return take(tensors[-1], frames[0]).expand_as(q)
        if isinstance(chosen, JointKernel):
            return chosen.attend(tensors, positions, frames, scales)
        policy = POLICIES.get(q.device.type, OTHER) if policy is None else policy
        sizes = tuple(_size_class(q, s, policy) for s in segments)
        key = _register((frames, positions, scales, sizes, _max_frames(q, policy)), policy, chosen)
        if chosen.traceable:
            return _joint_softmax(key, *tensors)
        out: Tensor = _JointSoftmax.apply(*_REGISTERED[key], *tensors)
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
                f"a segment's own query {tuple(s.query.shape)} does not have q's shape {tuple(q.shape)}"
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


def _key_count(segment: Segment) -> int:
    return segment.k.shape[1] * segment.k.shape[2]


def _size_class(q: Tensor, segment: Segment, policy: Policy) -> SizeClass:
    """Classify a segment's keys; by branches, on whose symbolic lengths torch.compile sets guards."""
    if _key_count(segment) < policy.join_below:
        return SizeClass.TINY
    light = policy.light_ratio * segment.k.shape[2] <= q.shape[1] * q.shape[2]
    return SizeClass.LIGHT if light else SizeClass.LARGE


def _longest(q: Tensor, segments: Sequence[Segment]) -> int:
    """Bound the length of a read: all queries of a sample, or the keys of all segments, which may be joined."""
    return max(q.shape[1] * q.shape[2], sum(_key_count(s) for s in segments))


# ---- the kernel calls: constants of a compiled graph -------------------------------------------------------

CallArguments = tuple[
    tuple[Frames, ...], Positions, tuple[float, ...], tuple[SizeClass, ...], tuple[int, int] | None
]
"""Arguments of `build_calls` but the policy, in order."""


@constant
def _register(arguments: CallArguments, policy: Policy, kernel: Kernel) -> int:
    """Return a key of `_REGISTERED` for the calls and the kernel: a compiled graph can hold a number only.

    In a compiled graph the softmax is one node: to trace it would take as long as the rest of a block.
    """
    if arguments[-1] is None and kernel.traceable:
        allow_in_graph(_joint_softmax)
    return _cached_key(arguments, policy, kernel)


_REGISTERED: dict[int, tuple[Calls, Kernel]] = {}
_COUNT = count()


@cache
def _cached_key(arguments: CallArguments, policy: Policy, kernel: Kernel) -> int:
    key = next(_COUNT)
    _REGISTERED[key] = build_calls(*arguments, policy), kernel
    return key


def _positions(own: tuple[bool, ...]) -> Positions:
    """Return the positions of each segment's query, k and v in (q, own queries in order, k, v, k, v, ...)."""
    keys = 1 + sum(own)
    return tuple(
        (1 + sum(own[:i]) if has else 0, keys + 2 * i, keys + 2 * i + 1) for i, has in enumerate(own)
    )


def _max_frames(q: Tensor, policy: Policy) -> tuple[int, int] | None:
    """Return the query frames of one call, forward and backward; None in a compiled graph.

    In a batch with shifts no call is split: a part of a shift has nearly as many rows as the whole.
    """
    if torch.compiler.is_compiling():
        return None
    if len(q) > 1 and policy.shifts:
        return UNLIMITED_FRAMES, UNLIMITED_FRAMES
    piece = policy.call_elements // max(1, q[0, 0].numel())
    if policy.max_pieces is None:
        least = -(-torch.get_num_threads() // q.shape[3])
    else:
        least = -(-q.shape[1] // policy.max_pieces)
    frames = max(piece, least, 1)
    return (frames if policy.split_forward else UNLIMITED_FRAMES), frames


# ---- the joint softmax -------------------------------------------------------------------------------------


def _joint_softmax(key: int, *tensors: Tensor) -> Tensor:
    """Run `_REGISTERED[key]` on q, the own queries in order, then k, v of every segment. Returns (b f n k d)."""
    out: Tensor = _JointSoftmax.apply(*_REGISTERED[key], *tensors)
    return out


class _Context(FunctionCtx):
    calls: Calls
    kernel: Kernel
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, ...]


class _JointSoftmax(torch.autograd.Function):
    """The joint softmax as a list of kernel calls."""

    @staticmethod
    def forward(ctx: _Context, calls: Calls, kernel: Kernel, *tensors: Tensor) -> Tensor:
        parts = [_forward(calls, kernel, sample) for sample in _samples(calls, tensors)]
        out, lse = _concatenate([o for o, _ in parts]), _concatenate([log for _, log in parts])
        ctx.calls, ctx.kernel = calls, kernel
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        samples = _samples(ctx.calls, (*ctx.saved_tensors, grads[0]))
        parts = [_backward(ctx.calls, ctx.kernel, needed, *sample) for sample in samples]
        return (None, None, *(_concatenate(part) for part in zip(*parts, strict=True)))


def _shift(call: KernelCall, policy: Policy, tensors: Sequence[Tensor]) -> int:
    """Return the frames of a video if the call takes its read as a shift of the whole batch, else 0."""
    q, k = tensors[call.q], tensors[call.k]
    if not policy.shifts or q.shape[1] != k.shape[1]:
        return 0
    return q.shape[1] if call.read.is_shift(q.shape[1]) else 0


def _samples(calls: Calls, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Split the batch into samples if its blocks would have to be copied and are large."""
    q = tensors[0]
    if calls.compiled or len(q) == 1 or q[0].numel() < calls.policy.copy_below:
        return [tensors]
    if all(
        len(call.read.queries) == 1
        or _shift(call, calls.policy, tensors)
        or (is_whole(call.read.queries, q.shape[1]) and is_whole(call.read.groups, tensors[call.k].shape[1]))
        for call in calls.forward
    ):
        return [tensors]
    return [[t[i : i + 1] for t in tensors] for i in range(len(q))]


Part = TypeVar("Part", Tensor, Tensor | None)


def _concatenate(parts: Sequence[Part]) -> Part:
    """Concatenate the samples' results; None if they are None."""
    tensors = [part for part in parts if part is not None]
    return parts[0] if len(parts) == 1 or not tensors else torch.cat(tensors)


def _forward(calls: Calls, kernel: Kernel, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output (b f n k d) and log-sum-exp (b f n k 1)."""
    q = tensors[0]
    out, lse = None, None
    for call in calls.forward:
        o, log = _run_call(call, calls.policy, kernel, tensors)
        if out is None and is_whole(call.read.queries, q.shape[1]):
            out, lse = o.reshape(q.shape).contiguous(), log.reshape(*q.shape[:-1], 1)
            continue
        if out is None or lse is None:
            out, lse = torch.zeros_like(q), log.new_full((*q.shape[:-1], 1), -torch.inf)
        if call.fresh:
            put(out, call.read.queries, o)
            put(lse, call.read.queries, log)
        else:
            _merge(out, lse, call.read, o, log)
        del o, log  # before the next kernel runs: a read's result is as large as the output
    assert out is not None and lse is not None
    return out, lse


def _key_parts(call: KernelCall) -> list[tuple[Index, int, int]]:
    """Return (groups, position of k, position of v) of the call's keys, in their order."""
    return [(call.read.groups, call.k, call.v), *call.joined]


def _lay_out_keys(call: KernelCall, tensors: Sequence[Tensor], shift: int) -> tuple[Tensor, Tensor]:
    """Lay out k and v for the kernel; views, unless others are joined."""
    ks = [lay_out(tensors[i], groups, shift) for groups, i, _ in _key_parts(call)]
    vs = [lay_out(tensors[i], groups, shift) for groups, _, i in _key_parts(call)]
    return (ks[0], vs[0]) if len(ks) == 1 else (torch.cat(ks, dim=2), torch.cat(vs, dim=2))


def _run_call(
    call: KernelCall, policy: Policy, kernel: Kernel, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    queries, shift = call.read.queries, _shift(call, policy, tensors)
    q = lay_out(tensors[call.q], queries, shift)
    out, lse = kernel.forward(q, *_lay_out_keys(call, tensors, shift), call.scale)
    return lay_back(out, queries, shift), lay_back(lse.unsqueeze(-1), queries, shift)


def _merge(out: Tensor, lse: Tensor, read: Read, o: Tensor, log: Tensor) -> None:
    """Merge a partial softmax into (out, lse) in place: exact by log-sum-exp (docs/attention.md, equation 3)."""
    old, old_log = take(out, read.queries), take(lse, read.queries)
    old.lerp_(o, torch.sigmoid(log - old_log).to(o.dtype))
    put(lse, read.queries, torch.logaddexp(old_log, log))
    if not is_view(read.queries):
        put(out, read.queries, old)


def _backward(calls: Calls, kernel: Kernel, needed: Sequence[bool], *saved: Tensor) -> list[Tensor | None]:
    """Return the gradients of the tensors.

    saved: the tensors, the merged output and log-sum-exp, and the gradient of the output.
    """
    *tensors, out, lse, dout = saved
    sums = [_GradientSum(t) for t in tensors]
    for call in calls.backward:
        queries, shift = call.read.queries, _shift(call, calls.policy, tensors)
        g, q, o, log = (lay_out(t, queries, shift) for t in (dout, tensors[call.q], out, lse))
        keys = _lay_out_keys(call, tensors, shift)
        dq, dk, dv = kernel.backward(g, q, *keys, o, log.squeeze(-1), call.scale)
        parts = [(call.q, queries, dq)]
        sources = _key_parts(call)
        sizes = [len(groups[0]) * tensors[i].shape[2] for groups, i, _ in sources]
        for (groups, i, j), k, v in zip(
            sources, torch.split(dk, sizes, 2), torch.split(dv, sizes, 2), strict=True
        ):
            parts += [(i, groups, k), (j, groups, v)]
        for i, index, part in parts:
            if needed[i]:
                sums[i].add(index, lay_back(part, index, shift))
        del keys, dq, dk, dv, parts, part, k, v  # before the next kernel runs
    return [total.finish() if need else None for total, need in zip(sums, needed, strict=True)]


class _GradientSum:
    """Sum of gradients of a tensor (b f n k d), part by part; the first part of a frame is written, not added."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.total: Tensor | None = None
        self.left = set(range(like.shape[1]))  # frames without a gradient yet

    def add(self, index: Index, part: Tensor) -> None:
        frames = {i for row in index for i in row}
        if self.total is None and is_whole(index, self.like.shape[1]):
            self.total = part.reshape(self.like.shape)
        elif frames <= self.left:
            put(self._allocated(), index, part)
        else:
            self._zero(frames & self.left)
            add(self._allocated(), index, part)
        self.left -= frames

    def finish(self) -> Tensor:
        """Return the sum; a frame that nothing reads has a gradient of zero."""
        self._zero(self.left)
        return self._allocated()

    def _allocated(self) -> Tensor:
        if self.total is None:
            self.total = torch.empty_like(self.like)
        return self.total

    def _zero(self, frames: set[int]) -> None:
        for i in frames:
            if i - 1 not in frames:  # a run begins
                self._allocated()[:, i : next(j for j in count(i) if j not in frames)].zero_()
