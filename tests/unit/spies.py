"""Helpers for the tests of the seam and of both backbones: small models and sites, and a tap that watches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_booth.inject import QKV, Injection, Latents, Modulation, Residuals, Site, Sites
from dit_booth.models.dit.model import DiTConfig, VideoDiT


class Spy(nn.Module):
    """Keeps every payload that passes, and scales it."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[Any] = []

    def forward(self, payload: Any, image: object) -> Any:
        self.seen.append(payload)
        if isinstance(payload, Residuals):  # place 0 has the payload's shape
            return payload.adding({0: payload.x * (self.factor - 1)})
        field = {QKV: "q", Modulation: "vector", Latents: "x"}[type(payload)]
        return replace(payload, **{field: getattr(payload, field) * self.factor})


def tapped(sites: list[Site], tap: nn.Module) -> Injection:
    """Return an injection of one tap, without an image, at all these sites."""
    return Injection({site.name: [(tap, None)] for site in sites})


def worst(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()


def dit() -> VideoDiT:
    torch.manual_seed(0)
    backbone = VideoDiT(DiTConfig(), channels=3, text_dim=8, text_embed_dim=6)
    for p in backbone.parameters():
        p.data.normal_(std=0.1)
    return backbone


def sites_of(*sites: Site) -> Sites:
    return Sites(sites, image_dim=8, image_embed_dim=8, latent_channels=3, frames=3)
