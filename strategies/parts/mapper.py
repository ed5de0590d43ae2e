"""ELITE's global mapping (arXiv 2302.13848), which VideoBooth's coarse stage takes over: image states to words."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Mapper(nn.Module):
    """e_j = MLP_cls_j(s_j[:, :1]) + mean over patches of MLP_patch_j(s_j[:, 1:]), for five image states s_j."""

    def __init__(self, image_dim: int, width: int, text_dim: int, states: int = 5) -> None:
        super().__init__()
        self.states = states
        for j in range(states):  # upstream's names
            self.add_module(f"mapping_{j}", _mlp(image_dim, width, text_dim))
            self.add_module(f"mapping_patch_{j}", _mlp(image_dim, width, text_dim))

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Map five states (b (1 + n) c) to words (b 5 d)."""
        return torch.cat([c + p.mean(1, keepdim=True) for c, p in self.mapped(states)], dim=1)

    def mapped(self, states: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each state's class token (b 1 d) and patches (b n d), through the MLPs of their own."""
        assert len(states) == self.states, f"{len(states)} states for {self.states} pairs of MLPs"
        for j, state in enumerate(states):
            cls, patch = self.get_submodule(f"mapping_{j}"), self.get_submodule(f"mapping_patch_{j}")
            yield cls(state[:, :1]), patch(state[:, 1:])


class LocalMapper(Mapper):
    """ELITE's local mapping: one feature per patch, the mean over the states of MLP_cls_j(cls) + MLP_patch_j(patch)."""

    def forward(self, states: tuple[Tensor, ...]) -> Tensor:
        """Map five states (b (1 + n) c) to patch features (b n d)."""
        return torch.stack([c + p for c, p in self.mapped(states)]).mean(0)


def _mlp(image_dim: int, width: int, text_dim: int) -> nn.Sequential:
    hidden = [nn.Linear(image_dim, width), nn.LayerNorm(width), nn.LeakyReLU()]
    return nn.Sequential(
        *hidden, nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Linear(width, text_dim)
    )
