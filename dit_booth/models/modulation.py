"""Modulation of a sub-layer by a vector: shift, scale and gate (adaLN)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class ShiftScaleGate(NamedTuple):
    """One sub-layer's part of the adaLN vector: ``x + gate * layer(norm(x) * (1 + scale) + shift)``.

    b f 1 d each; f is 1 where all frames have one timestep.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None  # none: one (adaLN without the zero)

    @classmethod
    def split(cls, vector: Tensor, parts: int, each: int) -> list[ShiftScaleGate]:
        """Split an adaLN vector, (b c) or of every frame (f b c), into those of `parts` sub-layers."""
        form = "b (p e d) -> p e b 1 1 d" if vector.ndim == 2 else "f b (p e d) -> p e b f 1 d"
        return [cls(*value.unbind(0)) for value in rearrange(vector, form, p=parts, e=each).unbind(0)]

    @property
    def of_frame_0(self) -> ShiftScaleGate:
        """The part of frame 0: that of tokens which belong to no frame."""
        return ShiftScaleGate(*(None if y is None else y[:, :1] for y in self))  # type: ignore[arg-type]

    def modulate(self, normed: Tensor) -> Tensor:
        """Compute the sub-layer's input. Overwrites `normed` where no gradient needs it."""
        if torch.is_grad_enabled():
            return normed * (1 + self.scale) + self.shift
        return normed.mul_(1 + self.scale).add_(self.shift)

    def add_residual(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the sub-layer's gated output y to the residual stream x. Overwrites y where no gradient needs it."""
        if self.gate is None:
            return x + y
        return x + (self.gate * y if torch.is_grad_enabled() else y.mul_(self.gate))
