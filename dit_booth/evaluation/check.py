"""Checks that the metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pictures(name: str, value: Tensor, *, axes: str) -> None:
    """Refuse a tensor that is not the picture or video that `axes` (`3 h w` or `f 3 h w`) says.

    Raises:
        ValueError: naming the field, what it is, and what it must be.
    """
    rank = len(axes.split())
    if value.ndim != rank or value.shape[-3] != 3 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({axes}), not empty")
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}; it must be floating point in [-1, 1]: use x / 127.5 - 1")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or infinity; look for the step that made them")
