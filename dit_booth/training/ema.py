"""Exponential moving average of the trained parameters, on whatever part of them this rank holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def local(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter: its ZeRO-3 partition, or all of it."""
    return getattr(parameter, "ds_tensor", parameter).data


class Ema:
    """Shadow copies in float32 (a decay near 1 is lost in bfloat16)."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.shadow = {name: local(p).detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (from 1); the decay warms up so that the start is forgotten quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.parameters.items():
            self.shadow[name].lerp_(local(parameter).float(), 1 - decay)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """The end of a stage: its averaged weights become its weights."""
        for name, parameter in self.parameters.items():
            local(parameter).copy_(self.shadow[name])
