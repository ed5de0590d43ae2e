"""Attention of short sequences as two operators: ``dit_booth::short_attention`` and its backward.

Temporal attention is many rows of a few frames. A FlashAttention tile of 128 queries would be mostly empty there; the
Triton kernels behind these operators (`short_triton.py`) have tiles as small as 16, a program for each row and head,
and a backward that is one kernel. They are operators so that torch.compile takes them as they are, and so that Triton
is imported by the first call, not by every start.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LONGEST = 64
"""Queries, and keys, in a sequence: all of them are in a program's registers."""


def has_triton() -> bool:
    """Whether there is Triton, with what it builds its launchers from: a C compiler and Python's headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return find_spec("triton") is not None and compiler is not None and header.exists()


def short_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`kernels.Kernel.forward` for n, m <= LONGEST."""
    out, lse = short_attention(q, k, v, scale)
    return out, lse


def short_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`kernels.Kernel.backward` for n, m <= LONGEST."""
    dq, dk, dv = short_attention_backward(dout, q, k, v, out, lse, scale)
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    """For a result of x's shape (b k n d): tokens before heads in memory, which is how callers read on."""
    b, heads, n, d = x.shape
    return x.new_empty(b, n, heads, d).transpose(1, 2)


def _lse_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


# No gradient is registered: `segments` calls the backward itself, with the merged output and log-sum-exp.


@torch.library.custom_op("dit_booth::short_attention", mutates_args=())
def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (b k n d) and natural log-sum-exp (b k n), float32."""
    from dit_booth.attention.kernels.short_triton import forward

    out, lse = _like(q), _lse_of(q)
    forward(q, k, v, out, lse, scale)
    return out, lse


@short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), _lse_of(q)


@torch.library.custom_op("dit_booth::short_attention_backward", mutates_args=())
def short_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (b k n d), k and v (b k m d), given the output and log-sum-exp of a softmax over more keys."""
    from dit_booth.attention.kernels.short_triton import backward

    dq, dk, dv = _like(q), _like(k), _like(v)
    backward(dout, q, k, v, out, lse, dq, dk, dv, scale)
    return dq, dk, dv


@short_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)
