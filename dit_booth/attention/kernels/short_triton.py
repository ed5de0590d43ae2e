# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""The Triton kernels behind `short.py`: one program for each row of the batch and head, all of it in registers.

Operands are read once, where they are, whatever their strides; results are written once, tokens before heads. The
programs of a row's heads follow each other, since the heads' elements share cache lines. Importing this module imports
Triton. Its functions are in Triton's language, which takes no type but constexpr.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

LEAST = 16
"""Smallest side of a tile: that of a tensor core's product."""

# Names in the kernels: `width` is the head size; `side_n`, `side_m` and `columns` are the sides of tiles, powers of two
# that n, m and width fit into; strides count units of `unit` elements, which tells Triton that vectors are aligned.


@triton.jit
def _at(row, head, by_row, by_head, by_token, unit: tl.constexpr, side: tl.constexpr, columns: tl.constexpr):
    """Offsets (side columns) of one row and head's elements, in 64 bits: a batch may have more than 2 ** 31."""
    start = (row * by_row + head * by_head) * unit
    tokens = tl.arange(0, side).to(tl.int64) * (by_token * unit)
    return start + tokens[:, None] + tl.arange(0, columns)[None, :]


@triton.jit
def _inside(count, width: tl.constexpr, side: tl.constexpr, columns: tl.constexpr):
    return (tl.arange(0, side)[:, None] < count) & (tl.arange(0, columns)[None, :] < width)


# fmt: off
@triton.jit
def _forward(
    q, k, v, out, lse, scale, heads, n, m,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    unit: tl.constexpr, width: tl.constexpr, side_n: tl.constexpr, side_m: tl.constexpr, columns: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    asks = _inside(n, width, side_n, columns)
    holds = _inside(m, width, side_m, columns)
    q_ = tl.load(q + _at(row, head, q_row, q_head, q_token, unit, side_n, columns), mask=asks, other=0.0)
    k_ = tl.load(k + _at(row, head, k_row, k_head, k_token, unit, side_m, columns), mask=holds, other=0.0)
    v_ = tl.load(v + _at(row, head, v_row, v_head, v_token, unit, side_m, columns), mask=holds, other=0.0)

    scores = tl.dot(q_, tl.trans(k_)) * (scale * LOG2E)
    scores = tl.where(tl.arange(0, side_m)[None, :] < m, scores, float("-inf"))
    most = tl.max(scores, 1)
    p = tl.exp2(scores - most[:, None])
    total = tl.sum(p, 1)
    result = tl.dot(p.to(v_.dtype), v_) / total[:, None]

    at = _at(row, head, n * heads * width, width, heads * width, 1, side_n, columns)
    tl.store(out + at, result.to(q_.dtype), mask=asks)
    tokens = tl.arange(0, side_n)
    tl.store(lse + program * n + tokens, (most + tl.log2(total)) * LN2, mask=tokens < n)


@triton.jit
def _backward(
    dout, q, k, v, out, lse, dq, dk, dv, scale, heads, n, m,
    dout_row, dout_head, dout_token, q_row, q_head, q_token, k_row, k_head, k_token,
    v_row, v_head, v_token, out_row, out_head, out_token, lse_row, lse_head, lse_token,
    unit: tl.constexpr, width: tl.constexpr, side_n: tl.constexpr, side_m: tl.constexpr, columns: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    asks = _inside(n, width, side_n, columns)
    holds = _inside(m, width, side_m, columns)
    tokens = tl.arange(0, side_n)
    dout_ = tl.load(dout + _at(row, head, dout_row, dout_head, dout_token, unit, side_n, columns), mask=asks, other=0.0)
    out_ = tl.load(out + _at(row, head, out_row, out_head, out_token, unit, side_n, columns), mask=asks, other=0.0)
    q_ = tl.load(q + _at(row, head, q_row, q_head, q_token, unit, side_n, columns), mask=asks, other=0.0)
    k_ = tl.load(k + _at(row, head, k_row, k_head, k_token, unit, side_m, columns), mask=holds, other=0.0)
    v_ = tl.load(v + _at(row, head, v_row, v_head, v_token, unit, side_m, columns), mask=holds, other=0.0)
    at = row * lse_row + head * lse_head + tokens.to(tl.int64) * lse_token
    lse_ = tl.load(lse + at, mask=tokens < n, other=0.0) * LOG2E
    delta = tl.sum(dout_.to(tl.float32) * out_.to(tl.float32), 1)

    # Scores and their gradients with keys first: of three products that need them, two read them as they are.
    scores = tl.dot(k_, tl.trans(q_)) * (scale * LOG2E)
    # Padding keys have a score of 0, which may be far above the log-sum-exp: mask them, or exp2 overflows.
    p = tl.where(tl.arange(0, side_m)[:, None] < m, tl.exp2(scores - lse_[None, :]), 0.0)
    ds = (p * (tl.dot(v_, tl.trans(dout_)) - delta[None, :])).to(q_.dtype)

    at = _at(row, head, m * heads * width, width, heads * width, 1, side_m, columns)
    tl.store(dv + at, tl.dot(p.to(q_.dtype), dout_).to(q_.dtype), mask=holds)
    tl.store(dk + at, (tl.dot(ds, q_) * scale).to(q_.dtype), mask=holds)
    at = _at(row, head, n * heads * width, width, heads * width, 1, side_n, columns)
    tl.store(dq + at, (tl.dot(tl.trans(ds), k_) * scale).to(q_.dtype), mask=asks)
# fmt: on


# ---- launches ----------------------------------------------------------------------------------------------


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """Write out (b k n d), tokens first in memory, and lse (b k n), contiguous."""
    q, k, v = _row_contiguous(q, k, v)
    # A warp per 2048 elements of a tile: 64 elements of each operand in a thread.
    _launch(_forward, 2048, (q, k, v, out, lse), scale, q, k, (q, k, v))


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, scale: float,
) -> None:  # fmt: skip
    """Write dq (b k n d), dk and dv (b k m d), tokens first in memory. lse: (b k n), any strides."""
    dout, q, k, v, out = _row_contiguous(dout, q, k, v, out)
    # Five operands and three results: half as many elements in a thread.
    _launch(
        _backward,
        1024,
        (dout, q, k, v, out, lse, dq, dk, dv),
        scale,
        q,
        k,
        (dout, q, k, v, out),
        lse.stride(),
    )


def _row_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Make the last axis contiguous, as the kernels need it; an expanded gradient is not."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _launch(
    kernel: triton.JITFunction,
    per_warp: int,
    pointers: tuple[Tensor, ...],
    scale: float,
    q: Tensor,
    k: Tensor,
    operands: tuple[Tensor, ...],
    extra_strides: tuple[int, ...] = (),
) -> None:
    """Launch the kernel with the strides of `operands`, then `extra_strides`."""
    (b, heads, n, d), m = q.shape, k.shape[2]
    if not b * heads:
        return
    strides = [s for t in operands for s in t.stride()[:-1]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    side_n, side_m, columns = (max(LEAST, triton.next_power_of_2(x)) for x in (n, m, d))
    warps = min(8, max(1, max(side_n, side_m) * columns // per_warp))
    device_of: Callable[[Tensor], AbstractContextManager[object]] = torch.cuda.device_of
    with device_of(q):
        kernel[(b * heads,)](
            *pointers,
            scale,
            heads,
            n,
            m,
            *(s // unit for s in strides),
            *extra_strides,
            unit=unit,
            width=d,
            side_n=side_n,
            side_m=side_m,
            columns=columns,
            num_warps=warps,
            num_stages=1,
        )
