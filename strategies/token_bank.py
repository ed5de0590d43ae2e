"""Token bank: the reference as a few tokens that every frame reads, instead of all its keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.inject import KV, QKV, Condition, Reference, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register


@dataclass(frozen=True, kw_only=True)
class TokenBankConfig(StrategyConfig):
    source: Literal["clip", "latent"] = "clip"
    """CLIP's patch states, or the reference's hidden state at each site (a pass through the backbone)."""
    kind: Literal["perceiver", "pool"] = "perceiver"
    """A Perceiver resampler with `tokens` learned queries, or average pooling of the source's grid by `pool`."""
    tokens: int = 16
    """perceiver: size of the bank (the study has 4, 16 and 64)."""
    depth: int = 2
    """perceiver: its layers."""
    per_site: bool = False
    """perceiver: one for each site, or one that all sites of a width share."""
    pool: Literal[2, 4, 8] = 4
    """pool: how many places along a side become one."""
    reference_noise: Literal["matched", "clean"] = "clean"
    """latent: noise the reference to the video's timestep, or keep it clean (one pass for all sampling steps)."""
    where: str = "*"
    """Glob over the cross-frame attentions that read the bank."""

    def __post_init__(self) -> None:
        for name in ("tokens", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"token_bank.{name} is {getattr(self, name)}; use 1 or more")


@register("token_bank")
class TokenBank(Strategy):
    """Every frame also reads a small bank of image tokens: a Perceiver's, or a pooled grid's."""

    Config = TokenBankConfig
    trains = {"fine": ("*",), "joint": ("*",)}

    def __init__(self, config: TokenBankConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.clip, self.noise = config.source == "clip", config.reference_noise
        self.depends_on_time = not self.clip and self.noise == "matched"
        self.shared = nn.ModuleDict()  # width -> bank
        self.readers: dict[str, ReadBank] = {}
        for site in sites.match(config.where, port="qkv", role="cross_frame"):
            width = sites.image_dim if self.clip else site.dim
            reader = self.readers[site.name] = self.attach(site, ReadBank(site, width))
            if config.kind == "pool":
                reader.bank = Pool(config.pool)
            elif config.per_site:
                reader.bank = Perceiver(width, config.tokens, config.depth)
            elif str(width) not in self.shared:
                self.shared[str(width)] = Perceiver(width, config.tokens, config.depth)

    def forward(self, reference: Reference) -> Condition:
        return Condition(kv={at: self.readers[at].project(x) for at, x in self.tokens(reference).items()})

    def tokens(self, reference: Reference) -> Mapping[str, Tensor]:
        """Site name -> the bank that it reads (b m c)."""
        patches = reference.states[0][:, 1:]
        if self.clip and self.shared:
            (bank,) = self.shared.values()
            return dict.fromkeys(self.readers, bank(patches))
        hidden = {} if self.clip else reference.hidden(list(self.readers), self.noise)
        states = {at: hidden.get(at, patches) for at in self.readers}
        return {at: (self.readers[at].bank or self.shared[str(x.shape[-1])])(x) for at, x in states.items()}


class ReadBank(nn.Module):
    """Keys and values of the bank; they start as the backbone's where they read its own hidden state."""

    def __init__(self, site: Site, width: int) -> None:
        super().__init__()
        self.bank: nn.Module | None = None
        self.to_k_bank, self.to_v_bank = (site.copy_of(f"to_{y}", from_width=width) for y in "kv")

    def project(self, tokens: Tensor) -> KV:
        return KV(self.to_k_bank(tokens), self.to_v_bank(tokens))

    def forward(self, qkv: QKV, condition: Condition) -> QKV:
        return qkv if condition.here_kv is None else qkv.reading_image(*condition.here_kv)


class Pool(nn.Module):
    """Average pooling of a square grid of tokens (b n c) by `by` along each side; windows at the edge are smaller."""

    def __init__(self, by: int) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        grid = rearrange(x, "b (h w) c -> b c h w", h=isqrt(x.shape[1]))
        return rearrange(F.avg_pool2d(grid, self.by, ceil_mode=True), "b c h w -> b (h w) c")


class Perceiver(nn.Module):
    """Learned queries read [image; themselves] (Flamingo's resampler, arXiv 2204.14198, section 3.1.1): b m c."""

    def __init__(self, width: int, tokens: int, depth: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(tokens, width) * width**-0.5)
        self.layers = nn.ModuleList(PerceiverLayer(width) for _ in range(depth))

    def forward(self, image: Tensor) -> Tensor:
        x = self.latents.expand(len(image), -1, -1)
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
        return x + self.mlp(self.norm_mlp(x))
