"""The one place where a model is put together: backbone, text encoder and strategies."""

from __future__ import annotations

from collections.abc import Mapping

from dit_booth.inject import Dims, Sites
from dit_booth.models.clip.encoders import NULL_PROMPT, TextEncoder
from dit_booth.models.dit.model import VideoDiT
from dit_booth.models.injected import Injected
from dit_booth.models.unet.model import VideoUNet
from dit_booth.strategy import StrategyConfig, create, find

Backbone = VideoDiT | VideoUNet


def assemble(
    backbone: Backbone,
    text: TextEncoder,
    strategies: str,
    dims: Dims,
    *,
    options: Mapping[str, StrategyConfig] | None = None,
    seed: int = 0,
) -> Injected:
    """Attach strategies (``a+b``) to the sites of a backbone and a text encoder, whose weights they start from.

    options: of the strategies, by name; absent ones keep their defaults. seed: of the strategies' random weights.
    ValueError: an unknown strategy, or one that finds no site here.
    """
    sites = Sites((*text.sites(), *backbone.sites()), *dims)
    strategy = create(find(strategies), options or {}, sites, seed)
    return Injected(backbone, text, strategy, text.tokenize([NULL_PROMPT]))
