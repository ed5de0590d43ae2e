"""Exponential moving average of the trained parameters, on whatever part of them this rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def local(parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of a parameter: its ZeRO-3 partition, or all of it."""
    return getattr(parameter, "ds_tensor", parameter).data


@torch.no_grad()
def set_local(parameter: nn.Parameter, value: Tensor) -> None:
    """Replace this rank's part of a parameter.

    ZeRO-3 keeps small parameters whole between their uses; such a copy is dropped, and gathered anew at the next use.
    """
    local(parameter).copy_(value)
    if hasattr(parameter, "ds_tensor"):
        parameter.partition()  # type: ignore[attr-defined]  # a method of DeepSpeed's


def power_of(width: float) -> float:
    """Return EDM2's exponent gamma for a power-function average of relative standard deviation `width`.

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al., arXiv 2312.02696, section 3.1); it falls with
    gamma, from 0.289 at gamma 0.
    """
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        wider = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
        low, high = (middle, high) if wider else (low, middle)
    return (low + high) / 2


class Ema:
    """Shadow copies in float32 (a decay near 1 is lost in bfloat16).

    By default with a constant `decay`; with a `width`, by a power function of the step (see `power_of`).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, width: float = 0.0) -> None:
        self.parameters, self.decay = parameters, decay
        self.power = power_of(width) if width else None
        self.shadow = {name: local(p).detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after optimizer step `step` (from 1)."""
        decay = self.decay_at(step)
        for name, parameter in self.parameters.items():
            self.shadow[name].lerp_(local(parameter).float(), 1 - decay)

    def decay_at(self, step: int) -> float:
        """Return the decay at a step: the constant one after a warm-up, or EDM2's, which grows (section 3.1)."""
        if self.power is None:
            return min(self.decay, (1 + step) / (10 + step))
        return float((1 - 1 / step) ** (self.power + 1))

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replace the parameters by their averages, at the end of a stage."""
        for name, parameter in self.parameters.items():
            set_local(parameter, self.shadow[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Replace the parameters by their averages for a while; afterwards they are as before, bit for bit."""
        trained = {name: local(p).clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                set_local(parameter, trained[name])
