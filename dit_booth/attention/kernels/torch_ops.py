"""Kernels that come with PyTorch: plain mathematics, the CPU's flash kernel, CUDA's flash and efficient kernels.

Each is a pair of functions for a `choice.Kernel`. The operators are PyTorch's own (``torch.ops.aten``), one
level below `scaled_dot_product_attention`, because only they return the log-sum-exp and take a merged one back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from einops import rearrange, reduce
from torch import Tensor

aten = torch.ops.aten

MAX_LAUNCH_ROWS = 2**16 - 1
"""Most batch rows in one launch: the limit of a CUDA grid's second dimension, which temporal attention exceeds."""


Run = TypeVar("Run", bound=Callable[..., tuple[Tensor, ...]])


def in_launches(run: Run) -> Run:
    """Run a CUDA kernel over a batch of any size; the last argument is the scale, the others are tensors."""

    @functools.wraps(run)
    def launched(*arguments: Tensor | float) -> tuple[Tensor, ...]:
        tensors, scale = cast(tuple[Tensor, ...], arguments[:-1]), arguments[-1]
        if len(tensors[0]) <= MAX_LAUNCH_ROWS:
            return run(*tensors, scale)
        parts = [
            run(*rows, scale)
            for rows in zip(*(torch.split(t, MAX_LAUNCH_ROWS) for t in tensors), strict=True)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    return cast(Run, launched)


# ---- plain mathematics, any device -------------------------------------------------------------------------


def math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (_wide(q) @ _wide(k).transpose(-1, -2)) * scale
    lse = scores.logsumexp(-1)
    return (torch.exp(scores - lse.unsqueeze(-1)) @ _wide(v)).to(v.dtype), lse


def math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    dout, q, k, v, out = (_wide(t) for t in (dout, q, k, v, out))
    p = torch.exp((q @ k.transpose(-1, -2)) * scale - lse.unsqueeze(-1))
    delta = (dout * out).sum(-1, keepdim=True)
    ds = p * (dout @ v.transpose(-1, -2) - delta) * scale
    dq, dk, dv = ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ dout
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---- the CPU's flash kernel --------------------------------------------------------------------------------


def cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return out, lse


def in_chunks(units: Callable[[Tensor, Tensor], int], least: int) -> Callable[[Run], Run]:
    """Let a kernel's backward split the queries of few long sequences into batch rows of at least `least` queries.

    units: the number of chunks that occupies the device; a fold of many frames has too few rows and heads for it.
    The gradients of the keys are summed over the chunks.
    """

    def chunked(backward: Run) -> Run:
        @functools.wraps(backward)
        def run(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
        ) -> tuple[Tensor, ...]:
            c = 1 if torch.compiler.is_compiling() else _chunks(q.shape[2], units(q, k), least)
            if c > 1:
                dout, q, out = (rearrange(t, "b k (c n) d -> (b c) k n d", c=c) for t in (dout, q, out))
                lse = rearrange(lse, "b k (c n) -> (b c) k n", c=c)
                k, v = (t.unsqueeze(1).expand(-1, c, -1, -1, -1).flatten(0, 1) for t in (k, v))
            dq, dk, dv = backward(dout, q, k, v, out, lse, scale)
            if c > 1:
                dq = rearrange(dq, "(b c) k n d -> b k (c n) d", c=c)
                dk, dv = (reduce(t, "(b c) k n d -> b k n d", "sum", c=c) for t in (dk, dv))
            return dq, dk, dv

        return cast(Run, run)

    return chunked


def _chunks(n: int, wanted: int, least: int) -> int:
    return next((c for c in range(wanted, 2 * wanted) if n % c == 0), 1) if 1 < wanted <= n // least else 1


def _cpu_chunks(q: Tensor, k: Tensor) -> int:
    """Return the chunks that give every CPU thread a row and head."""
    return -(-torch.get_num_threads() // (q.shape[0] * q.shape[1]))


@in_chunks(_cpu_chunks, least=64)
def cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return dq, dk, dv


# ---- PyTorch's kernels on CUDA -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def cuda_chunks(q: Tensor, k: Tensor) -> int:
    """Return the chunks that give two thread blocks to each processor: backward uses one for 128 keys of a head."""
    if not torch.cuda.is_available():  # tensors without storage: FLOPs are counted, or shapes
        return 1
    return 2 * _processors(q.device) // (q.shape[0] * q.shape[1] * -(-k.shape[2] // 128))


@in_launches
def cuda_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 as built into PyTorch: (out, logsumexp, cumulative lengths, lengths, random state, mask)."""
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return out, lse


@in_chunks(cuda_chunks, least=512)
@in_launches
def cuda_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the random state is never read, and without cumulative lengths the batch is dense.
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    offset = torch.empty(0, dtype=torch.uint64, device=q.device)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),  # the kernel ignores its strides
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        False,
        seed,
        offset,
        scale=scale,
    )
    return dq, dk, dv


# cuDNN's log-sum-exp is natural, (b k n 1), float32. Some versions look up a backward by the shapes and strides of q, k
# and v alone, so the other operands always have one layout.


@in_launches
def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention: (out, logsumexp, cumulative lengths, lengths, random state, mask)."""
    if q.shape[2] == 1 or k.shape[2] == 1:  # versions differ in whether they take one query or key
        return cuda_flash_forward(q, k, v, scale)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, False, False, scale=scale
    )
    return out, lse.reshape(q.shape[:3])


@in_chunks(cuda_chunks, least=512)
@in_launches
def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # Its gradients are sums in any order; what FlashAttention-2 needs from the forward pass is the same.
    if q.shape[2] == 1 or k.shape[2] == 1 or torch.are_deterministic_algorithms_enabled():
        return cuda_flash_backward(dout, q, k, v, out, lse, scale)
    state = torch.empty((), dtype=torch.int64, device=q.device)  # random numbers: no dropout, not read
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
        _tokens_first(dout),
        q,
        k,
        v,
        _tokens_first(out),
        lse.contiguous().unsqueeze(-1),
        state,
        state,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        False,
        scale=scale,
    )
    return dq, dk, dv


def _tokens_first(x: Tensor) -> Tensor:
    """Copy (b k n d) to a contiguous (b n k d) layout in memory if it is not so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


LSE_ALIGNMENT = 32
"""Rows of the efficient kernel's log-sum-exp are padded to a multiple of this."""


@in_launches
def cuda_efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """xFormers' memory-efficient attention as built into PyTorch; it also takes float32."""
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
    return out, lse[..., : q.shape[2]]


@in_launches
def cuda_efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[2]
    rows = -(-n // LSE_ALIGNMENT) * LSE_ALIGNMENT
    padded = torch.nn.functional.pad(lse, (0, rows - n), value=torch.inf).contiguous()  # exp(x - inf) = 0
    out = _tokens_first(out)  # strides not all read
    state = torch.empty(0, dtype=torch.int64, device=q.device)  # random numbers: no dropout, not read
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, padded, state, state, 0.0, [True, True, True, False], False, scale=scale
    )
    return dq, dk, dv
