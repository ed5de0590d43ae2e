"""The choice of a kernel: `TABLE` lists what each kernel supports, `choose_kernel` reads it.

A kernel is plain attention (b k n d) that returns its log-sum-exp, with a backward that accepts the output and
log-sum-exp of a larger softmax. `flex` is the exception: it does the whole joint softmax at once.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec

import torch
from torch import Tensor

from dit_booth.attention.kernels import packages, short, torch_ops
from dit_booth.attention.kernels.short import MAX_LENGTH, has_triton
from dit_booth.attention.plans import Frames
from dit_booth.attention.tracing import constant

log = logging.getLogger(__name__)

Forward = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
Positions = tuple[tuple[int, int, int], ...]
"""Positions of query, k and v of every segment in the list of an attention's tensors."""
JointAttention = Callable[[Sequence[Tensor], Positions, tuple[Frames, ...], tuple[float, ...]], Tensor]


@dataclass(frozen=True)
class Kernel:
    """``forward(q, k, v, scale) -> (out, lse)``; ``backward(dout, q, k, v, out, lse, scale) -> (dq, dk, dv)``.

    q: (b k n d); k, v: (b k m d); out: (b k n d); lse: (b k n), natural logarithm, float32 at least. Operands may be
    views of any strides whose last axis is contiguous, keys of the batch's rows may overlap in memory.
    """

    forward: Forward
    backward: Backward
    traceable: bool = True
    """torch.compile can trace it; otherwise it breaks the graph."""


@dataclass(frozen=True)
class JointKernel:
    """``attend(tensors, positions, frames, scales) -> out`` (b f n k d): the whole joint softmax, differentiable.

    frames, scales: one entry for each segment.
    """

    attend: JointAttention


UNLIMITED = 1 << 62
"""Maximum sequence length of a kernel without a limit."""


@dataclass(frozen=True)
class KernelSupport:
    """A kernel and the tensors that it supports."""

    name: str
    kernel: Kernel | JointKernel
    device: str  # a device type, or any
    dtypes: tuple[torch.dtype, ...]
    head_multiple: int = 1
    min_head: int = 1
    max_head: int = 1 << 16
    capability: tuple[int, int] = (0, 0)  # of a CUDA device, at least
    max_length: int = UNLIMITED  # queries or keys in one sequence
    trains: bool = True
    auto: bool = True
    installed: Callable[[], bool] = lambda: True
    install: str = ""


def _has_flash() -> bool:
    """Look for flash-attn 2's extension: flash-attn-4 also installs a package named ``flash_attn``."""
    return find_spec("flash_attn_2_cuda") is not None


def _has_flash4() -> bool:
    try:
        return bool(distribution("flash-attn-4"))
    except PackageNotFoundError:
        return False


def _flex_attend(
    tensors: Sequence[Tensor], positions: Positions, frames: tuple[Frames, ...], scales: tuple[float, ...]
) -> Tensor:
    from dit_booth.attention.kernels import flex  # imports PyTorch's compiler: seconds of every start

    return flex.flex_attend(tensors, positions, frames, scales)


F16, F32, F64 = (torch.float16, torch.bfloat16), (torch.float32,), (torch.float64,)
FLASH = Kernel(packages.flash_forward, packages.flash_backward)
FLASH4 = Kernel(packages.flash4_forward, packages.flash4_backward, traceable=False)
SHORT = Kernel(short.short_forward, short.short_backward)
CUDNN = Kernel(torch_ops.cudnn_forward, torch_ops.cudnn_backward)
CUDA_FLASH = Kernel(torch_ops.cuda_flash_forward, torch_ops.cuda_flash_backward)
CPU_FLASH = Kernel(torch_ops.cpu_flash_forward, torch_ops.cpu_flash_backward)
EFFICIENT = Kernel(torch_ops.cuda_efficient_forward, torch_ops.cuda_efficient_backward)
MATH = Kernel(torch_ops.math_forward, torch_ops.math_backward)
FLEX = JointKernel(_flex_attend)
PIP = "pip install -e .[flash] --no-build-isolation"
PIP4 = "pip install --pre flash-attn-4"
TRITON = "pip install triton; apt install gcc python3-dev"

SHORT_ON_CPU = 16
"""Longest sequence on CPUs for which `auto` takes batched matrix products instead of the flash kernel."""

# In order of preference: `auto` takes the first kernel that supports the tensors.
TABLE = (
    KernelSupport(
        "short", SHORT, "cuda", F16, 8, 8, 128, (8, 0), MAX_LENGTH, installed=has_triton, install=TRITON
    ),
    KernelSupport("flash4", FLASH4, "cuda", F16, 8, 8, 128, (9, 0), installed=_has_flash4, install=PIP4),
    KernelSupport("cudnn", CUDNN, "cuda", F16, 8, 8, 128, (9, 0)),
    KernelSupport("flash", FLASH, "cuda", F16, 8, 8, 256, (8, 0), installed=_has_flash, install=PIP),
    KernelSupport("torch_flash", CUDA_FLASH, "cuda", F16, 8, 8, 256, (8, 0)),
    KernelSupport("math", MATH, "cpu", F32 + F64, max_length=SHORT_ON_CPU),
    KernelSupport("torch_flash", CPU_FLASH, "cpu", F16 + F32 + F64),
    KernelSupport("torch_flash", CPU_FLASH, "meta", F16),  # shapes and memory of a GPU's kernels
    KernelSupport("torch_efficient", EFFICIENT, "cuda", F16, 8, capability=(8, 0)),
    KernelSupport("torch_efficient", EFFICIENT, "cuda", (torch.float16,), 8, capability=(7, 0)),
    KernelSupport("torch_efficient", EFFICIENT, "cuda", F32, 4, capability=(5, 0)),
    KernelSupport("math", MATH, "any", F16 + F32 + F64),
    KernelSupport("flex", FLEX, "cuda", F16 + F32, min_head=16, max_head=256, capability=(8, 0), auto=False),
    KernelSupport("flex", FLEX, "cpu", F16 + F32, min_head=16, max_head=256, trains=False, auto=False),
)
NAMES = tuple(sorted({row.name for row in TABLE}))
LIMITS = tuple(sorted({row.max_length for row in TABLE}))
LIMITED = set(NAMES) - {row.name for row in TABLE if row.max_length == UNLIMITED}


def check_kernel_name(name: str) -> None:
    """Raise ValueError unless `name` is ``auto`` or the name of a kernel."""
    if name != "auto" and name not in NAMES:
        raise ValueError(f"attention kernel {name!r} is unknown; use auto or one of {', '.join(NAMES)}")


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype, head: int, grad: bool, longest: int = UNLIMITED
) -> Kernel | JointKernel:
    """Choose the kernel for tensors with head size `head` on a device; grad: a backward pass is needed.

    longest: bound on the queries or keys in one sequence.
    Raises ValueError, with the reason and the fix, if the named kernel does not support them.
    """
    return TABLE[_find_constant(name, device, dtype, head, grad, _length_limit(name, longest))].kernel


def _length_limit(name: str, longest: int) -> int:
    """Return a constant for `longest`, which may be a symbol of torch.compile.

    This is the lowest limit that is not exceeded, so that a compiled graph serves all lengths between two limits; or
    `longest` itself for a named kernel with a limit, whose error message contains it.
    """
    if name in LIMITED:
        return operator.index(longest)
    for limit in LIMITS:
        if longest <= limit:
            return limit
    return UNLIMITED


@constant
def _find_constant(
    name: str, device: torch.device, dtype: torch.dtype, head: int, grad: bool, longest: int
) -> int:
    return _find(name, device, dtype, head, grad, longest)


@lru_cache(maxsize=256)
def _find(name: str, device: torch.device, dtype: torch.dtype, head: int, grad: bool, longest: int) -> int:
    check_kernel_name(name)
    asked = [i for i, row in enumerate(TABLE) if row.name == name or (name == "auto" and row.auto)]
    lacks = {i: _lacks(TABLE[i], device, dtype, head, grad, longest) for i in asked}
    fits = [i for i in asked if not lacks[i]]
    if not fits:
        nearest = min(asked, key=lambda i: (TABLE[i].device not in ("any", device.type), len(lacks[i])))
        hint = "" if name == "auto" else "; or use auto"
        raise ValueError(f"attention kernel {name!r} {' and '.join(lacks[nearest])}{hint}")
    if name == "auto":
        _announce(TABLE[fits[0]].name, device.type, dtype, head)
    return fits[0]


@lru_cache(maxsize=64)
def _announce(name: str, device: str, dtype: torch.dtype, head: int) -> None:
    log.info(
        "attention kernel on %s, %s, head size %d: %s", device, str(dtype).removeprefix("torch."), head, name
    )


def _lacks(
    row: KernelSupport, device: torch.device, dtype: torch.dtype, head: int, grad: bool, longest: int
) -> list[str]:
    """Return the reasons why a kernel does not support the tensors; empty if it does."""
    reasons = []
    if not row.installed():
        reasons.append(f"is not installed (on a machine with a CUDA GPU: `{row.install}`)")
    if row.device not in ("any", device.type):
        reasons.append(f"runs on {row.device}, not on {device.type}")
    elif row.capability > (has := _capability(device)):
        reasons.append(
            "needs a GPU of compute capability {}.{}, this one has {}.{}".format(*row.capability, *has)
        )
    if dtype not in row.dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        reasons.append(f"takes {names}, not {str(dtype).removeprefix('torch.')}")
    if head % row.head_multiple or not row.min_head <= head <= row.max_head:
        multiples = f"multiples of {row.head_multiple} " if row.head_multiple > 1 else ""
        reasons.append(f"takes head sizes {multiples}from {row.min_head} to {row.max_head}, not {head}")
    if longest > row.max_length:
        reasons.append(f"takes sequences up to {row.max_length}, not {longest}")
    if grad and not row.trains:
        reasons.append(f"has no backward on {row.device}")
    return reasons


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
