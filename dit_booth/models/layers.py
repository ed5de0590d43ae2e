"""Layers that the backbones share: embeddings of time and place, and attention behind the `qkv` port."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Frames, Segment, attend
from dit_booth.inject import QKV, Injection, Role, Site


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of t (b,), cosines first, in float32: (b dim). Transformer section 3.5."""
    half = dim // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angle = rearrange(t.float(), "b -> b 1") * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sincos(position: Tensor, dim: int) -> Tensor:
    """1-D sin-cos embedding of positions (n,): (n dim), sines first (ViT, MAE)."""
    half = dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=position.device, dtype=torch.float64) / half)
    angle = rearrange(position.double(), "n -> n 1") * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """2-D sin-cos embedding of a grid: (height * width, dim); the column fills the first half (DiT, MAE)."""
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos embedding needs a width divisible by 4, not {dim}")
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    row = rearrange(sincos(rows, dim // 2).expand(width, -1, -1), "w h d -> (h w) d")
    column = rearrange(sincos(columns, dim // 2).expand(height, -1, -1), "h w d -> (h w) d")
    return torch.cat([column, row], dim=-1).float()


class Attention(nn.Module):
    """Projections around `attend`, with the `qkv` port between: one class for frames, text and time.

    ``site.name`` equals the module's path. x: (b f n c); source: (b g m c), what keys and values come from (x itself
    for self-attention); frames: which groups of the source each of the f query frames reads.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        dim: int,
        heads: int,
        source_dim: int | None = None,
        bias: bool = False,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{name}: width {dim} is not divisible by {heads} heads")
        source_dim = source_dim or dim
        self.heads, self.kernel = heads, kernel
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(source_dim, dim, bias=bias)
        self.to_v = nn.Linear(source_dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)
        self.site = Site(
            name=name,
            port="qkv",
            role=role,
            dim=dim,
            heads=heads,
            projections={"to_q": self.to_q, "to_k": self.to_k, "to_v": self.to_v},
        )

    def forward(self, x: Tensor, source: Tensor, frames: Frames, inject: Injection) -> Tensor:
        q, k, v = (
            rearrange(project(y), "b f n (k d) -> b f n k d", k=self.heads)
            for project, y in ((self.to_q, x), (self.to_k, source), (self.to_v, source))
        )
        qkv = inject(self.site, QKV(q, (Segment(k, v, frames),), x, source, self.kernel))
        return self.to_out(rearrange(attend(qkv.q, qkv.segments, qkv.kernel), "b f n k d -> b f n (k d)"))
