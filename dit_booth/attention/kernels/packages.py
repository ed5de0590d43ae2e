"""Kernels of the FlashAttention packages: flash-attn 2.8 (`flash`) and flash-attn-4 (`flash4`).

Written against flash-attn 2.8.3 and flash-attn-4 4.0.0b36. Both keep tokens before heads (b n k d), return a
natural log-sum-exp (b k n) in float32, and take the output and log-sum-exp of a larger softmax in their backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor

from dit_booth.attention.kernels.torch_ops import cuda_chunks, in_chunks, in_launches
from dit_booth.attention.tracing import untraced


def _tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [rearrange(t, "b k n d -> b n k d") for t in tensors]


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [rearrange(t, "b n k d -> b k n d") for t in tensors]


# ---- flash-attn 2.8 ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _flash() -> ModuleType:
    """Import flash-attn, which registers the operators ``torch.ops.flash_attn``, which torch.compile can trace."""
    import flash_attn.flash_attn_interface as interface

    return interface  # type: ignore[no-any-return]


@in_launches
def flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _tokens_first(q, k, v)
    out, lse, *_ = _flash()._wrapped_flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )
    return _heads_first(out)[0], lse


@in_chunks(cuda_chunks, least=512)
@in_launches
def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = _tokens_first(dout, q, k, v, out)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    _flash()._wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous(),  # the kernel ignores its strides
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=None,
    )
    dq, dk, dv = _heads_first(dq, dk, dv)
    return dq, dk, dv


# ---- flash-attn-4 ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _flash4() -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """Return forward and backward; they compile themselves, so torch.compile must not trace them."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return untraced(_flash_attn_fwd), untraced(_flash_attn_bwd)


@in_launches
def flash4_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _tokens_first(q, k, v)
    out, lse, *_ = _flash4()[0](q, k, v, softmax_scale=scale, return_lse=True)
    return _heads_first(out)[0], lse


@in_launches
def flash4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = _tokens_first(dout, q, k, v, out)
    gradients = _flash4()[1](
        q,
        k,
        v,
        out.contiguous(),
        dout.contiguous(),
        lse.contiguous(),
        softmax_scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    dq, dk, dv = _heads_first(*gradients)
    return dq, dk, dv
