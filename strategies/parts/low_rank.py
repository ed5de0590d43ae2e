"""Low-rank changes of linear layers, as taps of the `linear` port (LoRA, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dit_booth.inject import Projection, Site, Sites
from dit_booth.strategy import Strategy


class LowRank(nn.Module):
    """W x + scale B A x, with B zero at the start."""

    def __init__(self, site: Site, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        base = site.projections["linear"]
        self.scale = scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, projection: Projection, image: None) -> Projection:
        return replace(projection, y=projection.y + self.scale * self.up(self.down(projection.x)))


def adapt_reference(strategy: Strategy, sites: Sites, attentions: Sequence[Site], rank: int) -> None:
    """Change queries, keys and values of these attentions in the reference's own pass (Stand-In, arXiv 2508.07901).

    The queries of the last one stay: nothing that is recorded depends on them.
    """
    names = [f"{at.name}.to_{y}" for at in attentions for y in "qkv"]
    layers = {site.name: site for site in sites.of(port="linear")}
    for name in (name for name in names if name != f"{attentions[-1].name}.to_q"):
        strategy.attach_to_reference(layers[name], LowRank(layers[name], rank))
