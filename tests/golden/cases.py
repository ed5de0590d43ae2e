"""What a check of one golden output says, and how far two tensors are apart.

A family's module (``unet_cases.py``, ...) has one function, ``cases(info, tensors) -> Iterator[CaseResult]``: all
that it needs to know comes from the json and the tensors of the file, never from the files that happen to be here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT32 = 2e-5
"""Largest error of a float32 computation whose output is of order one; also of float64 against stored float32."""
FLOAT64 = 1e-9
"""Largest error of a float64 computation against another one, where the output is of order one."""

Info = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Cases = Callable[[Info, Tensors], Iterator["CaseResult"]]


@dataclass(frozen=True)
class CaseResult:
    """One comparison, named ``OUTPUT`` or ``OUTPUT how``: `check.py` asks for one of every output of a file."""

    name: str
    error: float = 0.0
    tolerance: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # a NaN is not


def worst(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; infinite where the shapes differ."""
    return relative(ours, theirs, floor=0.0, slope=0.0)


def relative(ours: Tensor, theirs: Tensor, floor: float = 1.0, slope: float = 1.0) -> float:
    """The largest |ours - theirs| / (floor + slope |theirs|), for outputs far from order one (x0 at late steps)."""
    if ours.shape != theirs.shape:
        return float("inf")
    theirs = theirs.double()
    error = (ours.double() - theirs).abs()
    scale = floor + slope * theirs.abs() if slope else torch.ones(())
    return (error / scale).max().item()


def tolerance(dtype: torch.dtype, stored: Tensor) -> float:
    """What a run in `dtype` must reach against a `stored` output, relative to its RMS where that is above one."""
    return max(1.0, stored.double().square().mean().sqrt().item()) * flat(dtype, stored)


def flat(dtype: torch.dtype, stored: Tensor) -> float:
    """The same, whatever the size of the output.

    The original ran in float32: a float64 run cannot come closer to its tensors than their own rounding errors. Only
    a file that stores float64 (the tests write such ones) can ask for more.
    """
    return FLOAT64 if dtype == stored.dtype == torch.float64 else FLOAT32


def outputs(tensors: Tensors) -> dict[str, Tensor]:
    """The outputs of a file, by name."""
    return {k.removeprefix("outputs."): v for k, v in tensors.items() if k.startswith("outputs.")}


def cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in `dtype`, but for integers."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def labelled(name: str, dtype: torch.dtype) -> str:
    """A case's name: the output's, and the dtype where it is not float32."""
    return name if dtype == torch.float32 else f"{name} float64"
