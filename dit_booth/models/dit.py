"""The video DiT: a diffusion transformer (Peebles & Xie) with cross-frame attention by plan and temporal attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FramePlan, Frames
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Injection, Latents, Modulation, Site, no_injection
from dit_booth.models.clip import Text
from dit_booth.models.layers import Attention, sincos, sincos_2d, timestep_embedding


class Size(NamedTuple):
    depth: int
    hidden: int
    heads: int


SIZES = {  # S to XL as in DiT, table 1
    "nano": Size(5, 128, 4),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    size: Literal["nano", "S", "B", "L", "XL"] = "nano"
    """Depth, width and heads; S to XL as in DiT (table 1)."""
    patch: Literal[1, 2, 4, 8] = 2
    """Side of a token in latent pixels."""
    plan: str = "first+previous"
    """Frames that a frame reads: a sum of self, first, previous, window(k), keyframes(m), sink(s), all."""
    attention: str = "auto"
    """Attention kernel."""
    checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"dit.size is {self.size!r}; use one of {', '.join(SIZES)}")
        FramePlan(self.plan)


class VideoDiT(nn.Module):
    """x (b f c h w) at timestep t (b,) in [0, 1000) with text -> prediction (b f c h w).

    Time and pooled text modulate every block through adaLN-Zero (DiT section 3.2); there is no cross-attention.
    """

    def __init__(self, config: DiTConfig, *, channels: int, text_dim: int, text_embed_dim: int) -> None:
        super().__init__()
        size = SIZES[config.size]
        self.config, self.plan = config, FramePlan(config.plan)
        self.x_embedder = PatchEmbed(channels, size.hidden, config.patch)
        self.t_embedder = TimestepEmbedder(size.hidden)
        self.text_embedder = nn.Linear(text_embed_dim, size.hidden)
        self.blocks = nn.ModuleList(
            DiTBlock(f"blocks.{i}", size.hidden, size.heads, config.attention) for i in range(size.depth)
        )
        self.final_layer = FinalLayer(size.hidden, channels, config.patch)
        self.entry = Site(name="latents.entry", port="latents", role="entry", dim=channels)
        self.exit = Site(name="latents.exit", port="latents", role="exit", dim=channels)
        self.text_site = Site(
            name="text_embedder",
            port="modulation",
            role="text",
            dim=size.hidden,
            projections={"projection": self.text_embedder},
        )
        self.initialise()

    def forward(self, x: Tensor, t: Tensor, text: Text, inject: Injection = no_injection) -> Tensor:
        x = inject(self.entry, Latents(x)).x
        height, width = x.shape[-2:]
        plan = self.plan.frames(x.shape[1])
        x = self.x_embedder(x)  # b f n d
        c = self.t_embedder(t, x.dtype) + self.embed_text(text, inject)  # b d
        for block in self.blocks:
            if self.config.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, plan, inject, use_reentrant=False)
            else:
                x = block(x, c, plan, inject)
        x = self.final_layer(x, c, height, width)
        return inject(self.exit, Latents(x)).x

    def embed_text(self, text: Text, inject: Injection) -> Tensor:
        return inject(self.text_site, Modulation(self.text_embedder(text.pooled), text.pooled)).vector

    def sites(self) -> list[Site]:
        """Every site of the backbone, in the order of the forward pass."""
        blocks = [site for block in self.blocks if isinstance(block, DiTBlock) for site in block.sites()]
        return [self.entry, self.text_site, *blocks, self.exit]

    def initialise(self) -> None:
        """DiT's initialisation: Xavier-uniform layers, zero gates and a zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        for small in (*self.t_embedder.mlp.modules(), self.text_embedder):
            if isinstance(small, nn.Linear):
                nn.init.normal_(small.weight, std=0.02)
        zeroed = [m.linear for m in self.modules() if isinstance(m, BlockModulation | FinalLayer)]
        for parameter in (
            *self.final_layer.adaLN_modulation.parameters(),
            *(p for z in zeroed for p in z.parameters()),
        ):
            nn.init.zeros_(parameter)


class PatchEmbed(nn.Module):
    """Latent patches to tokens, with fixed 2-D sin-cos positions and sin-cos frame positions."""

    def __init__(self, channels: int, hidden: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, patch, patch)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[1], x.shape[-2], x.shape[-1]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latents of {height} x {width} cannot be cut into patches of {self.patch};"
                " change dit.patch or data.size"
            )
        tokens = self.proj(rearrange(x, "b f c h w -> (b f) c h w"))
        hidden = tokens.shape[1]
        tokens = rearrange(tokens, "(b f) d h w -> b f (h w) d", f=frames)
        place = sincos_2d(height // self.patch, width // self.patch, hidden, x.device)
        time = sincos(torch.arange(frames, device=x.device), hidden).float()
        return tokens + (rearrange(place, "n d -> 1 n d") + rearrange(time, "f d -> f 1 d")).to(tokens.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t through two layers."""

    def __init__(self, hidden: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, self.features).to(dtype))


class Modulate(NamedTuple):
    """One sub-layer's part of the adaLN vector: ``gate * layer(norm(x) * (1 + scale) + shift)``."""

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def of(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale) + self.shift


class BlockModulation(nn.Module):
    """The adaLN vector of a block, behind the `modulation` port: a triple each for attn1, attn_temp and mlp."""

    def __init__(self, name: str, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 9 * hidden)
        self.site = Site(
            name=name, port="modulation", role="block", dim=9 * hidden, projections={"linear": self.linear}
        )

    def forward(self, c: Tensor, inject: Injection) -> tuple[Modulate, Modulate, Modulate]:
        c = nn.functional.silu(c)
        vector = inject(self.site, Modulation(self.linear(c), c)).vector
        parts = rearrange(vector, "b (p d) -> p b 1 1 d", p=9).unbind(0)
        return Modulate(*parts[0:3]), Modulate(*parts[3:6]), Modulate(*parts[6:9])


class DiTBlock(nn.Module):
    """Cross-frame attention by plan, temporal attention at each place, MLP; each behind its own modulation."""

    def __init__(self, name: str, hidden: int, heads: int, kernel: str) -> None:
        super().__init__()
        self.modulation = BlockModulation(f"{name}.modulation", hidden)
        self.attn1 = Attention(f"{name}.attn1", "cross_frame", hidden, heads, bias=True, kernel=kernel)
        self.attn_temp = Attention(f"{name}.attn_temp", "temporal", hidden, heads, bias=True, kernel=kernel)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU("tanh"), nn.Linear(4 * hidden, hidden)
        )
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)

    def forward(self, x: Tensor, c: Tensor, plan: Frames, inject: Injection) -> Tensor:
        space, time, channel = self.modulation(c, inject)
        h = space.of(self.norm(x))
        x = x + space.gate * self.attn1(h, h, plan, inject)
        h = rearrange(time.of(self.norm(x)), "b f n d -> (b n) 1 f d")
        h = self.attn_temp(h, h, seen_by_all(1), inject)
        x = x + time.gate * rearrange(h, "(b n) 1 f d -> b f n d", b=len(x))
        return x + channel.gate * self.mlp(channel.of(self.norm(x)))

    def sites(self) -> list[Site]:
        return [self.modulation.site, self.attn1.site, self.attn_temp.site]


class FinalLayer(nn.Module):
    """Modulated norm, then tokens back to latents."""

    def __init__(self, hidden: int, channels: int, patch: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.patch = patch

    def forward(self, x: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        shift, scale = rearrange(self.adaLN_modulation(c), "b (p d) -> p b 1 1 d", p=2)
        x = self.linear(self.norm_final(x) * (1 + scale) + shift)
        p = self.patch
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)
