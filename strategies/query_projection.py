"""Query learning: the frames ask with queries of their own, which VideoBooth keeps frozen (its missing ablation)."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from dit_booth.errors import check_ranges
from dit_booth.inject import QKV, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

Mode = Literal["frozen", "shared", "separate", "lora"]


@dataclass(frozen=True, kw_only=True)
class QueryProjectionConfig(StrategyConfig):
    mode: Mode = "shared"
    """frozen: the backbone's (control, no parameter); shared: a trained copy asks all keys; separate: it asks only the
    image's, in one softmax with the frames' (needs kv_concat, token_bank or decoupled_attention); lora: a low-rank
    change of the backbone's."""
    rank: int = 16
    """lora: rank of the change."""
    where: str = "*.attn1"
    """Glob over the attentions whose queries are learned; `*.attn2`: those of the text."""

    def __post_init__(self) -> None:
        check_ranges(self, "query_projection", rank="[1, 65536]")


@register("query_projection")
class QueryProjection(Strategy):
    """Learned queries, for all keys or for the image's alone; combine it with a strategy that brings image keys."""

    Config = QueryProjectionConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    identity_at_init = True
    reads_image = False
    order = -1  # what reads the image at a site reads it with these queries

    def __init__(self, config: QueryProjectionConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        if config.mode == "frozen":
            self.trains = {}
            return
        for site in sites.match(config.where, port="qkv"):
            self.attach(
                site, LowRank(site, config.rank) if config.mode == "lora" else Queries(site, config.mode)
            )


class Queries(nn.Module):
    """A trained copy of the query projection, for all keys (`shared`) or for the image's (`separate`)."""

    def __init__(self, site: Site, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.to_q_new = site.copy_of("to_q")

    def forward(self, qkv: QKV, image: None) -> QKV:
        q = qkv.queries(self.to_q_new(qkv.x))
        return replace(qkv, q=q) if self.mode == "shared" else replace(qkv, image_query=q)


class LowRank(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685, section 4.1): W + B A, with B zero at the start."""

    def __init__(self, site: Site, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(site.dim, rank, bias=False), nn.Linear(rank, site.dim, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, qkv: QKV, image: None) -> QKV:
        assert qkv.layer.raw_q is not None
        return replace(qkv, q=qkv.queries(qkv.layer.raw_q + self.up(self.down(qkv.x))))
