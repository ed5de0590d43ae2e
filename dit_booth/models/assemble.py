"""The one place where a model is put together: a backbone, and the strategies on it and on a text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dit_booth.inject import Dims, Sites
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.injected import Injected
from dit_booth.models.layers import linear_sites
from dit_booth.models.text.build import AnyTextEncoder
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.wan.model import VideoWan, WanConfig
from dit_booth.strategy import StrategyConfig, create, find

Backbone = VideoDiT | VideoUNet | VideoWan
BackboneConfig = DiTConfig | UNetConfig | WanConfig


def build_backbone(config: BackboneConfig, *, channels: int, text_dim: int, text_embed_dim: int) -> Backbone:
    """Build a backbone with random weights for latents of `channels` and a text encoder of these widths."""
    if isinstance(config, DiTConfig):
        return VideoDiT(config, channels=channels, text_dim=text_dim, text_embed_dim=text_embed_dim)
    if isinstance(config, WanConfig):
        return VideoWan(config, channels=channels, text_dim=text_dim)
    return VideoUNet(replace(config, in_channels=channels, out_channels=channels, text_dim=text_dim))


def assemble(
    backbone: Backbone,
    text: AnyTextEncoder,
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
    sites = Sites((*text.sites(), *backbone.sites(), *linear_sites(backbone)), *dims)
    strategy = create(find(strategies), options or {}, sites, seed)
    return Injected(backbone, text, strategy, text.tokenize([text.null_prompt]))
