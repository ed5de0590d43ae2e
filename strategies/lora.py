"""LoRA: low-rank changes of the backbone's queries and values (Hu et al., arXiv 2106.09685, sections 4.1 and 4.2)."""

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.errors import check_ranges
from dit_booth.inject import QKV, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register


@dataclass(frozen=True, kw_only=True)
class LoraConfig(StrategyConfig):
    rank: int = 8
    """Rank of the change."""
    alpha: float = 8.0
    """The change is scaled by alpha / rank."""
    where: str = "*"
    """Glob over the attentions that are changed."""

    def __post_init__(self) -> None:
        check_ranges(self, "lora", rank="[1, 65536]", alpha="[0, 1000000]")


@register("lora")
class Lora(Strategy):
    """Low-rank changes of queries and values, the paper's choice; alone (DreamBooth), or beside another strategy."""

    Config = LoraConfig
    trains = {"fine": ("*",), "joint": ("*",), "subject": ("*",)}
    identity_at_init = True
    reads_image = False
    order = -1  # before a strategy that copies or reads these queries

    def __init__(self, config: LoraConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        for site in sites.match(config.where, port="qkv"):
            self.attach(site, LowRankQV(site, config.rank, config.alpha / config.rank))


class LowRankQV(nn.Module):
    """W + scale B A for queries and values."""

    def __init__(self, site: Site, rank: int, scale: float) -> None:
        super().__init__()
        self.q = LowRank(site.projections["to_q"], rank, scale)
        self.v = LowRank(site.projections["to_v"], rank, scale)

    def forward(self, qkv: QKV, image: object) -> QKV:
        assert qkv.layer.raw_q is not None
        q = qkv.queries(qkv.layer.raw_q + self.q(qkv.x))
        own, *others = qkv.segments
        v = own.v + qkv.heads(self.v(qkv.source))
        return replace(qkv, q=q, segments=(Segment(own.k, v, own.frames), *others))


class LowRank(nn.Module):
    """scale B A x, with B zero at the start."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * cast(Tensor, self.up(self.down(x)))
