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

MAX_LENGTH = 64
"""Maximum queries, and keys, in a sequence: all are held in the registers of one program."""


def has_triton() -> bool:
    """Return True if Triton is installed, with a C compiler and Python's headers, from which it builds launchers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return find_spec("triton") is not None and compiler is not None and header.exists()


def short_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`choice.Kernel.forward` for n, m <= MAX_LENGTH."""
    out, lse = short_attention(q, k, v, scale)
    return out, lse


def short_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`choice.Kernel.backward` for n, m <= MAX_LENGTH."""
    dq, dk, dv = short_attention_backward(dout, q, k, v, out, lse, scale)
    return dq, dk, dv


def _empty_like(x: Tensor) -> Tensor:
    """Return an empty tensor of x's shape (b k n d), with tokens before heads in memory, as callers read it."""
    b, heads, n, d = x.shape
    return x.new_empty(b, n, heads, d).transpose(1, 2)


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=torch.float32)


# No gradient is registered: `joint_softmax` calls the backward itself, with the merged output and log-sum-exp.


@torch.library.custom_op("dit_booth::short_attention", mutates_args=())
def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output (b k n d) and natural log-sum-exp (b k n), float32."""
    from dit_booth.attention.kernels.short_triton import forward

    out, lse = _empty_like(q), _empty_lse(q)
    forward(q, k, v, out, lse, scale)
    return out, lse


@short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_like(q), _empty_lse(q)


@torch.library.custom_op("dit_booth::short_attention_backward", mutates_args=())
def short_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (b k n d), k and v (b k m d), given the output and log-sum-exp of a softmax over more keys."""
    from dit_booth.attention.kernels.short_triton import backward

    dq, dk, dv = _empty_like(q), _empty_like(k), _empty_like(v)
    backward(dout, q, k, v, out, lse, dq, dk, dv, scale)
    return dq, dk, dv


@short_attention_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)
