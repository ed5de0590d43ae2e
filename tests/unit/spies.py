"""Helpers for the tests of both backbones: a tap that watches, and how to put one at sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from dit_booth.inject import QKV, Injection, Latents, Modulation, Site


class Spy(nn.Module):
    """Keeps every payload that passes, and scales it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[Any] = []

    def forward(self, payload: Any, image: object) -> Any:
        self.seen.append(payload)
        field = {QKV: "q", Modulation: "vector", Latents: "x"}[type(payload)]
        return replace(payload, **{field: getattr(payload, field) * self.factor})


def tapped(sites: list[Site], tap: nn.Module) -> Injection:
    """Return an injection of one tap, without an image, at all these sites."""
    return Injection({site.name: [(tap, None)] for site in sites})


def worst(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()
