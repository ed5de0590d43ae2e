"""LoRA: low-rank changes of the backbone's linear layers (Hu et al., arXiv 2106.09685, sections 4.1 and 4.2)."""

from dataclasses import dataclass

from dit_booth.errors import check_ranges
from dit_booth.inject import Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

from .parts.low_rank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoraConfig(StrategyConfig):
    rank: int = 8
    """Rank of the change."""
    alpha: float = 8.0
    """The change is scaled by alpha / rank."""
    layers: tuple[str, ...] = ("*.to_q", "*.to_v")
    """Globs over the linear layers that are changed: *.to_q *.to_k *.to_v *.to_out* (attention), *.mlp.* (DiT),
    *.ff.* (U-Net), *.attn1.* (cross-frame attention alone)."""
    where: str = "*"
    """Glob over the attentions and MLPs whose layers are changed."""

    def __post_init__(self) -> None:
        check_ranges(self, "lora", rank="[1, 65536]", alpha="[0, 1000000]")
        if not self.layers:
            raise ValueError("lora.layers is empty; name at least one glob, such as *.to_q")


@register("lora")
class Lora(Strategy):
    """Low-rank changes of linear layers: queries and values (the paper's choice), or more; alone or beside another."""

    Config = LoraConfig
    trains = {"fine": ("*",), "joint": ("*",), "subject": ("*",)}
    identity_at_init = True
    reads_image = False

    def __init__(self, config: LoraConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        for site in chosen(config, sites):
            tap = LowRank(site, config.rank, config.alpha / config.rank)
            self.attach(site, tap, path=site.name.replace(".to_", "."))


def chosen(config: LoraConfig, sites: Sites) -> list[Site]:
    """Return the linear layers of `layers` inside `where`. ValueError: a glob matches none, or there are none."""
    named = {site.name for glob in config.layers for site in sites.match(glob, port="linear")}
    inside = {site.name for site in sites.match(f"{config.where}.*", port="linear")}
    found = [site for site in sites.of(port="linear") if site.name in named & inside]
    if not found:
        raise ValueError(
            f"lora.layers {' '.join(config.layers)} and lora.where {config.where} have no layer in common; widen one"
        )
    return found
