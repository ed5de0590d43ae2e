"""adaLN: a pooled image vector shifts what modulates the network (after DiT, arXiv 2212.09748, section 3.2)."""

from dataclasses import dataclass, replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dit_booth.errors import check_ranges
from dit_booth.inject import Condition, Hidden, Modulation, Reference, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

GRID = 4  # side of the grid that the latent is pooled to


@dataclass(frozen=True, kw_only=True)
class AdaLNConfig(StrategyConfig):
    source: Literal["embedding", "latent", "both"] = "both"
    """Features of the image: CLIP's image embedding, the reference's latent pooled to 4 x 4, or both."""
    width: int = 256
    """Width of the image vector that all sites share."""

    def __post_init__(self) -> None:
        check_ranges(self, "adaln", width="[1, 65536]")


@register("adaln")
class AdaLN(Strategy):
    """A pooled image vector shifts the modulation: of every DiT block, or once of the U-Net's time embedding."""

    Config = AdaLNConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    identity_at_init = True

    def __init__(self, config: AdaLNConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        widths = {"embedding": sites.image_embed_dim, "latent": sites.latent_channels * GRID**2}
        chosen = {k: v for k, v in widths.items() if config.source in (k, "both")}
        self.project = nn.ModuleDict(
            {k: nn.Sequential(nn.LayerNorm(v), nn.Linear(v, config.width)) for k, v in chosen.items()}
        )
        blocks = sites.of(port="modulation", role="block")
        for site in blocks or sites.match("*", port="modulation", role="time"):
            self.attach(site, Shift(config.width, site.dim))

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        pooled = F.adaptive_avg_pool2d(reference.latent[:, 0], GRID)
        features = {"embedding": reference.embedding, "latent": pooled.flatten(1)}
        vectors = [project(features[name]) for name, project in self.project.items()]
        return Condition(shared=F.silu(sum(vectors[1:], start=vectors[0])))  # b d


class Shift(nn.Module):
    """Adds the image's part to a modulation vector; zero at the start."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def forward(self, modulation: Modulation, image: Tensor | None) -> Modulation:
        if image is None:
            return modulation
        return replace(modulation, vector=modulation.vector + self.linear(image))
