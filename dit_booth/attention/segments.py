"""`attend`: one exact joint softmax over segments, from flash kernels and log-sum-exp merging.

The visibility of a segment (which query frame reads which group) is cut into few *reads*, each a plain batched
attention on views of the tensors: a *fold* (many frames read the same groups: their queries are laid end to end, so
frame 0 is never repeated) or a *pairing* (frame i reads group j(i): frames go to the batch). The partial results are
merged by their log-sum-exp. Backward runs each kernel's backward against the merged output and merged log-sum-exp
(the ring-attention identity), so neither scores nor concatenated keys are ever stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dit_booth.attention.kernels import Kernel, choose
from dit_booth.attention.plans import Frames


@dataclass(frozen=True)
class Segment:
    """Keys and values in g groups, and which query frames read which of them.

    A segment may carry its own queries (a query projection learned for the image keys): the softmax is still joint.
    """

    k: Tensor  # b g m k d
    v: Tensor  # b g m k d
    frames: Frames
    query: Tensor | None = None  # b f n k d


@dataclass(frozen=True)
class Read:
    """One plain attention: `queries` (frames) against `groups`; folded, or paired one to one."""

    queries: tuple[int, ...]
    groups: tuple[int, ...]
    folded: bool


def attend(
    q: Tensor, segments: Sequence[Segment], kernel: str = "auto", scale: float | None = None
) -> Tensor:
    """Softmax attention of every query over every key that it may read, in all segments jointly.

    q: (b f n k d), scaled by d ** -0.5 unless `scale` says otherwise. Returns (b f n k d).
    Raises ValueError where a query frame reads nothing or shapes disagree.
    """
    _validate(q, segments)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = _plan(tuple(s.frames for s in segments))
    queries = [s.query for s in segments if s.query is not None]
    own = tuple(s.query is not None for s in segments)
    keys_values = [t for s in segments for t in (s.k, s.v)]
    dtype = torch.promote_types(q.dtype, keys_values[0].dtype)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
    tensors = [t.to(dtype) for t in (q, *queries, *keys_values)]
    out: Tensor = _Joint.apply(plan, own, choose(kernel, tensors[0]), scale, *tensors)
    return out


def _validate(q: Tensor, segments: Sequence[Segment]) -> None:
    frames = q.shape[1]
    for s in segments:
        if len(s.frames) != frames:
            raise ValueError(f"a segment says what {len(s.frames)} query frames read, but there are {frames}")
        if s.k.shape != s.v.shape or s.k.shape[-2:] != q.shape[-2:] or s.k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k {tuple(s.k.shape)} and v {tuple(s.v.shape)} do not fit q {tuple(q.shape)} (b f n k d)"
            )
    for i in range(frames):
        if not any(s.frames[i] for s in segments):
            raise ValueError(
                f"query frame {i} reads no key in any segment; give it at least one in the frame plan"
            )


@torch.compiler.assume_constant_result
def _plan(frames: tuple[Frames, ...]) -> tuple[tuple[int, Read], ...]:
    """(segment, read) of every plain attention to run; a constant of the compiled graph."""
    return tuple((index, read) for index, f in enumerate(frames) for read in reads(f))


@lru_cache(maxsize=512)
def reads(frames: Frames) -> tuple[Read, ...]:
    """Cover a visibility exactly once by folds and pairings, the largest first."""
    left = {(i, g) for i, groups in enumerate(frames) for g in groups}
    out: list[Read] = []
    while left:
        fold = _largest_fold(left)
        pairing = _largest_pairing(left)
        folded = len(fold[0]) * len(fold[1]) >= len(pairing[0])
        queries, groups = fold if folded else pairing
        out.append(Read(queries, groups, folded))
        left -= (
            {(i, g) for i in queries for g in groups} if folded else set(zip(queries, groups, strict=True))
        )
    return tuple(out)


def _largest_fold(left: set[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The groups that share one set of reading frames, for the largest (frames x groups)."""
    readers: dict[int, frozenset[int]] = {g: frozenset(i for i, h in left if h == g) for _, g in left}
    clusters: dict[frozenset[int], list[int]] = {}
    for g in sorted(readers):
        clusters.setdefault(readers[g], []).append(g)
    who, what = max(clusters.items(), key=lambda c: len(c[0]) * len(c[1]))
    return tuple(sorted(who)), tuple(what)


def _largest_pairing(left: set[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The frames that read a group at one common distance (window and previous-frame plans)."""
    by_offset: dict[int, list[int]] = {}
    for i, g in sorted(left):
        by_offset.setdefault(g - i, []).append(i)
    offset, queries = max(by_offset.items(), key=lambda c: len(c[1]))
    return tuple(queries), tuple(i + offset for i in queries)


def _take(x: Tensor, index: tuple[int, ...]) -> Tensor:
    """Frames or groups of x (b f ...): a view where they are consecutive."""
    if index == tuple(range(index[0], index[-1] + 1)):
        return x[:, index[0] : index[-1] + 1]
    return x[:, list(index)]


def _add(x: Tensor, index: tuple[int, ...], y: Tensor) -> None:
    if index == tuple(range(index[0], index[-1] + 1)):
        x[:, index[0] : index[-1] + 1] += y
    else:
        x.index_add_(1, torch.tensor(index, device=x.device), y.to(x.dtype))


def _lay_out(x: Tensor, index: tuple[int, ...], folded: bool) -> Tensor:
    return rearrange(_take(x, index), "b f n k d -> b k (f n) d" if folded else "b f n k d -> (b f) k n d")


def _lay_back(x: Tensor, count: int, folded: bool) -> Tensor:
    if folded:
        return rearrange(x, "b k (f n) d -> b f n k d", f=count)
    return rearrange(x, "(b f) k n d -> b f n k d", f=count)


class _Joint(torch.autograd.Function):
    """The joint softmax. `tensors` are q, the own queries in order, then k, v of every segment."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[tuple[int, Read], ...],
        own: tuple[bool, ...],
        kernel: Kernel,
        scale: float,
        *tensors: Tensor,
    ) -> Tensor:
        q, *rest = tensors
        out, lse = None, None  # b f n k d; b f n k 1
        for index, read in plan:
            query, k, v = _operands(q, rest, own, index)
            o, log = kernel.forward(
                _lay_out(query, read.queries, read.folded),
                _lay_out(k, read.groups, read.folded),
                _lay_out(v, read.groups, read.folded),
                scale,
            )
            o = _lay_back(o, len(read.queries), read.folded)
            log = _lay_back(log.unsqueeze(-1), len(read.queries), read.folded)
            if out is None or lse is None:
                if len(read.queries) == q.shape[1]:
                    out, lse = o, log
                    continue
                out, lse = torch.zeros_like(q), log.new_full((*q.shape[:-1], 1), -torch.inf)
            _merge(out, lse, read.queries, o, log)
        assert out is not None and lse is not None
        ctx.plan, ctx.own, ctx.kernel, ctx.scale = plan, own, kernel, scale
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, *rest, out, lse = ctx.saved_tensors
        grad = [torch.zeros_like(t) for t in (q, *rest)]
        for index, read in ctx.plan:
            query, k, v = _operands(q, rest, ctx.own, index)
            dq, dk, dv = ctx.kernel.backward(
                *(_lay_out(t, read.queries, read.folded) for t in (grads[0], query)),
                *(_lay_out(t, read.groups, read.folded) for t in (k, v)),
                _lay_out(out, read.queries, read.folded),
                _lay_out(lse, read.queries, read.folded).squeeze(-1),
                ctx.scale,
            )
            at = _positions(ctx.own, index)
            _add(grad[at[0]], read.queries, _lay_back(dq, len(read.queries), read.folded))
            _add(grad[at[1]], read.groups, _lay_back(dk, len(read.groups), read.folded))
            _add(grad[at[2]], read.groups, _lay_back(dv, len(read.groups), read.folded))
        return (None, None, None, None, *grad)


def _positions(own: tuple[bool, ...], index: int) -> tuple[int, int, int]:
    """Where query, k and v of segment `index` stand among (q, own queries, k, v, k, v, ...)."""
    keys = 1 + sum(own) + 2 * index
    return (1 + sum(own[:index]) if own[index] else 0, keys, keys + 1)


def _operands(
    q: Tensor, rest: Sequence[Tensor], own: tuple[bool, ...], index: int
) -> tuple[Tensor, Tensor, Tensor]:
    at = _positions(own, index)
    everything = (q, *rest)
    return everything[at[0]], everything[at[1]], everything[at[2]]


def _merge(out: Tensor, lse: Tensor, index: tuple[int, ...], o: Tensor, log: Tensor) -> None:
    """Merge a partial softmax into (out, lse) in place: exact by log-sum-exp."""
    old_o, old_log = _take(out, index), _take(lse, index)
    new_log = torch.logaddexp(old_log, log)
    new_o = torch.lerp(old_o, o, torch.exp(log - new_log).to(o.dtype))
    if index == tuple(range(index[0], index[-1] + 1)):
        old_o.copy_(new_o)
        old_log.copy_(new_log)
    else:
        out[:, list(index)] = new_o
        lse[:, list(index)] = new_log
