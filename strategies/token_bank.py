"""Token bank: each image prompt as a few tokens that every frame reads, instead of all its keys and values."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit_booth.errors import check_ranges
from dit_booth.inject import KV, QKV, Condition, Hidden, Needs, Reference, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register

from .parts.resampler import AveragePool, Perceiver


@dataclass(frozen=True, kw_only=True)
class TokenBankConfig(AnchoredConfig):
    source: Literal["clip", "latent"] = "clip"
    """CLIP's patch states of each image prompt, or the first's hidden state at each site (a pass of the backbone)."""
    kind: Literal["perceiver", "pool"] = "perceiver"
    """A Perceiver resampler with `tokens` learned queries, or average pooling of the source's grid by `pool`."""
    tokens: int = 16
    """perceiver: size of the bank (the study has 4, 16 and 64)."""
    depth: int = 2
    """perceiver: its layers."""
    per_site: bool = False
    """perceiver: one for each site, or one that all sites (latent: of a width) share."""
    pool: Literal[2, 4, 8] = 4
    """pool: how many places along a side become one."""
    reference_noise: Literal["matched", "clean"] = "clean"
    """latent: noise the reference to the video's timestep, or keep it clean (one pass for all sampling steps)."""
    where: str = "*"
    """Glob over the cross-frame attentions that read the bank."""

    def __post_init__(self) -> None:
        self.check_anchors("token_bank")
        check_ranges(self, "token_bank", tokens="[1, 4096]", depth="[1, 100]")


@register("token_bank")
class TokenBank(Strategy):
    """Every frame also reads a small bank of image tokens: a Perceiver's, or a pooled grid's."""

    Config = TokenBankConfig
    trains = {"fine": ("*",), "joint": ("*",)}

    def __init__(self, config: TokenBankConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.clip, self.noise = config.source == "clip", config.reference_noise
        self.reads_all_images = self.clip
        self.shared = nn.ModuleDict()  # width of the source -> bank
        self.readers: dict[str, ReadBank] = {}
        chosen = sites.match(config.where, port="qkv", role="cross_frame")
        narrowest = min(site.dim for site in chosen)
        for site in chosen:
            source = sites.image_dim if self.clip else site.dim
            pooled = config.kind == "pool"
            width = source if pooled or not self.clip else narrowest
            reader = self.readers[site.name] = self.attach(site, ReadBank(site, width))
            if pooled:
                reader.bank = AveragePool(config.pool)
            elif config.per_site:
                reader.bank = Perceiver(source, width, config.tokens, config.depth)
            elif str(source) not in self.shared:
                self.shared[str(source)] = Perceiver(source, width, config.tokens, config.depth)

    def needs(self) -> Needs:
        return Needs() if self.clip else Needs(tuple(self.readers), self.noise)

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        tokens = self.tokens(reference, hidden)
        return Condition(at={at: self.readers[at].project(x) for at, x in tokens.items()})

    def tokens(self, reference: Reference, hidden: Hidden) -> dict[str, Tensor]:
        """Return site name -> the banks that it reads (b m c): one of each image prompt."""
        patches = [each.states[0][:, 1:] for each in reference.all]
        if self.clip and self.shared:
            (shared,) = self.shared.values()
            return dict.fromkeys(self.readers, torch.cat([shared(x) for x in patches], dim=1))
        states = {at: [hidden[at]] if at in hidden else patches for at in self.readers}
        return {at: torch.cat([self.bank_of(at, x) for x in xs], dim=1) for at, xs in states.items()}

    def bank_of(self, site: str, x: Tensor) -> Tensor:
        """Resample one image's states (b n c) for a site."""
        bank: Tensor = (self.readers[site].bank or self.shared[str(x.shape[-1])])(x)
        return bank


class ReadBank(nn.Module):
    """Keys and values of the bank; they start as the backbone's where they are of its width."""

    def __init__(self, site: Site, width: int) -> None:
        super().__init__()
        self.bank: nn.Module | None = None
        self.to_k_bank, self.to_v_bank = (site.copy_of(f"to_{y}", from_width=width) for y in "kv")

    def project(self, tokens: Tensor) -> KV:
        return KV(self.to_k_bank(tokens), self.to_v_bank(tokens))

    def forward(self, qkv: QKV, image: KV | None) -> QKV:
        return qkv if image is None else qkv.reading_image(image)
