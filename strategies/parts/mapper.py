"""ELITE's global mapping (arXiv 2302.13848), which VideoBooth's coarse stage takes over: image states to words."""

from __future__ import annotations

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
        cls, patch = (
            [self.get_submodule(f"{n}_{j}") for j in range(self.states)] for n in ("mapping", "mapping_patch")
        )
        words = [
            c(s[:, :1]) + p(s[:, 1:]).mean(1, keepdim=True)
            for c, p, s in zip(cls, patch, states, strict=True)
        ]
        return torch.cat(words, dim=1)


def _mlp(image_dim: int, width: int, text_dim: int) -> nn.Sequential:
    hidden = [nn.Linear(image_dim, width), nn.LayerNorm(width), nn.LeakyReLU()]
    return nn.Sequential(
        *hidden, nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Linear(width, text_dim)
    )
