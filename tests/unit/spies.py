"""What the tests of both backbones share: a tap that watches, and how to put one at sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dit_booth.inject import QKV, Condition, Injection, Latents, Modulation, Site


class Spy(nn.Module):
    """Keeps every payload that passes, and scales it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[Any] = []

    def forward(self, payload: Any, condition: Condition) -> Any:
        self.seen.append(payload)
        field = {QKV: "q", Modulation: "vector", Latents: "x"}[type(payload)]
        return replace(payload, **{field: getattr(payload, field) * self.factor})


def tapped(sites: list[Site], tap: nn.Module) -> Injection:
    """An injection of one tap, without an image, at all these sites."""
    return Injection({site.name: [(tap, Condition())] for site in sites})


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()
