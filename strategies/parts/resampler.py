"""From many image tokens to few: a Perceiver resampler, and average pooling."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class AveragePool(nn.Module):
    """Average pooling of a square grid of tokens (b n c) by `by` along each side; windows at the edge are smaller."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        grid = rearrange(x, "b (h w) c -> b c h w", h=isqrt(x.shape[1]))
        return rearrange(F.avg_pool2d(grid, self.by, ceil_mode=True), "b c h w -> b (h w) c")


class Perceiver(nn.Module):
    """Image tokens (b n `source`) -> `tokens` of `width` (b m c), after `depth` layers of attention, normalised.

    Learned queries read [image; themselves] (Flamingo's resampler, arXiv 2204.14198, section 3.1.1).
    """

    def __init__(self, source: int, width: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.enter = nn.Linear(source, width)
        self.layers = nn.ModuleList(PerceiverLayer(width) for _ in range(depth))

    def forward(self, image: Tensor) -> Tensor:
        x, image = self.latents.expand(len(image), -1, -1), self.enter(image)
        for layer in self.layers:
            x = layer(x, image)
        return F.layer_norm(x, x.shape[-1:])


class PerceiverLayer(nn.Module):
    """Attention of the bank x (b m c) to [image; x], then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 1 if width % 64 else width // 64
        self.norm_image, self.norm_x, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.to_q, self.to_kv, self.to_out = (nn.Linear(width, n * width, bias=False) for n in (1, 2, 1))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        y = self.norm_x(x)
        q, kv = self.to_q(y), self.to_kv(torch.cat([self.norm_image(image), y], dim=1))
        q, k, v = (rearrange(t, "b n (k d) -> b k n d", k=self.heads) for t in (q, *kv.chunk(2, dim=-1)))
        x = x + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b k n d -> b n (k d)"))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out
