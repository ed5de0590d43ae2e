"""Device-independent Gaussian noise: drawn on the CPU in float32, then moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one per row."""


def randn(
    shape: Sequence[int],
    generator: Generators,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal values of any `shape`, equal for equal generator states on every device and dtype.

    With one generator per row (b, the first axis) a row does not depend on the rest of the batch.
    Raises ValueError for a generator that lives on an accelerator: its values differ from the CPU's.
    """
    if not isinstance(generator, torch.Generator):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} rows: pass one, or one per row")
        return torch.stack([randn(shape[1:], row, device, dtype) for row in generator])
    require_cpu(generator)
    return torch.randn(tuple(shape), generator=generator).to(device=device, dtype=dtype)


def randn_like(x: Tensor, generator: Generators) -> Tensor:
    """Draw standard normal values with the shape, device and dtype of `x`."""
    return randn(x.shape, generator, x.device, x.dtype)


def per_row(draw: Callable[[int, torch.Generator], Tensor], rows: int, generator: Generators) -> Tensor:
    """Draw rows with ``draw(n, generator)``: all from one generator, or each row from its own."""
    if isinstance(generator, torch.Generator):
        return draw(rows, generator)
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows: pass one, or one per row")
    return torch.cat([draw(1, row) for row in generator])


def require_cpu(generator: torch.Generator) -> None:
    """Raise ValueError for a generator of another device."""
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator is on {generator.device}: random numbers are drawn on the CPU so that every device "
            "gets the same ones; pass torch.Generator('cpu').manual_seed(seed)"
        )


def expand_like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append axes to a `coefficient` (b,) or (b f) until it broadcasts against `x` (b ...) or (b f ...)."""
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype for arithmetic on noise levels: the promoted dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
