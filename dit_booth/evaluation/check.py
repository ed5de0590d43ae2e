"""Checks that the metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_pictures(name: str, value: Tensor, *, axes: str) -> None:
    """Raise an error if a tensor is not an image or video of these `axes` (`3 h w` or `f 3 h w`), finite and float.

    Raises:
        ValueError: naming the field, its value, and the requirement.
    """
    rank = len(axes.split())
    if value.ndim != rank or value.shape[-3] != 3 or value.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be ({axes}), not empty")
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}; it must be floating point in [-1, 1]: use x / 127.5 - 1")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} contains NaN or infinity; find the step that produces them")
