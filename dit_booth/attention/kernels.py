"""The kernels under `attend`: plain attention (b k n d) that returns its log-sum-exp, and its backward.

`choose` is the one table that says which kernel runs where.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """``forward(q, k, v, scale) -> (out, lse)``; ``backward(dout, q, k, v, out, lse, scale) -> (dq, dk, dv)``.

    q: (b k n d); k, v: (b k m d); out: (b k n d); lse: (b k n), natural logarithm, float32 at least.
    backward accepts the output and log-sum-exp of a larger softmax that these keys are part of.
    """

    name: str
    forward: Forward
    backward: Backward


def _math_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = _wide(q @ k.transpose(-1, -2)) * scale
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.unsqueeze(-1)).to(v.dtype) @ v, lse


def _math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    p = torch.exp(_wide(q @ k.transpose(-1, -2)) * scale - lse.unsqueeze(-1))
    delta = (_wide(dout) * _wide(out)).sum(-1, keepdim=True)
    ds = (p * (_wide(dout @ v.transpose(-1, -2)) - delta) * scale).to(q.dtype)
    return ds @ k, ds.transpose(-1, -2) @ q, p.to(v.dtype).transpose(-1, -2) @ dout


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return out, lse


def _cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, False, scale=scale
    )
    return dq, dk, dv


KERNELS = {
    "math": Kernel("math", _math_forward, _math_backward),
    "torch_flash": Kernel("torch_flash", _cpu_flash_forward, _cpu_flash_backward),
}


def choose(name: str, q: Tensor) -> Kernel:
    """The kernel for tensors like q. ``auto``: PyTorch's CPU flash kernel on the CPU, the math path elsewhere."""
    kernel: Kernel = _choose(name, q.device.type)
    return kernel


@torch.compiler.assume_constant_result
@lru_cache(maxsize=32)
def _choose(name: str, device: str) -> Kernel:
    if name == "auto":
        name = "torch_flash" if device == "cpu" else "math"
        log.info("attention kernel on %s: %s", device, name)
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is unknown; use auto or one of {', '.join(KERNELS)}")
    if name == "torch_flash" and device != "cpu":
        raise ValueError(
            "attention kernel 'torch_flash' runs on the CPU so far; use auto or math on this device"
        )
    return KERNELS[name]
