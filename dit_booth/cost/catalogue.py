"""Descriptions of strategies and models: ports, stages, and trained parameters on every model."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache
from typing import cast

import torch

from dit_booth.config import STAGES
from dit_booth.cost.describe import Encoders, GivenText
from dit_booth.inject import Dims
from dit_booth.models.assemble import Backbone, assemble, build_backbone
from dit_booth.models.clip.encoders import TextEncoder
from dit_booth.models.layers import linear_sites
from dit_booth.models.registry import MODELS, list_models
from dit_booth.strategy import Strategy, aliases, failed_plugins, registered


def describe_strategies(pattern: str = "*") -> list[str]:
    """Return an entry for each strategy that matches a glob, then the aliases and what failed to import."""
    chosen = [cls for name, cls in registered().items() if fnmatchcase(name, pattern)]
    entries = [describe_strategy(cls) for cls in chosen]
    entries += [f"{name}: {names}" for name, names in aliases().items() if fnmatchcase(name, pattern)]
    return entries + [f"plug-in {name} failed to import: {line}" for name, line in failed_plugins().items()]


def describe_strategy(cls: type[Strategy]) -> str:
    """Return a strategy's entry, with the default options."""
    ports: dict[str, None] = {}
    recorded, images = "nothing", "none"
    counts = []
    for name in MODELS:
        backbone, text, dims = bare_model(name)
        with torch.device("meta"):
            strategy = assemble(backbone, text, cls.name, dims).strategy.part(cls.name)
        sites = (*text.sites(), *backbone.sites(), *linear_sites(backbone))
        ports |= dict.fromkeys(site.port for site in sites if site.name in strategy.attached)
        needs = strategy.needs()
        if needs.sites:
            recorded = f"hidden states of the reference ({needs.noise} noise)"
        images = "none" if not cls.reads_image else "all" if strategy.reads_all_images else "the first"
        counts.append(f"{name} {trained(strategy, backbone) / 1e6:.3g}")
    summary = (cls.__doc__ or "").strip().splitlines()
    lines = [
        f"{cls.name}: {summary[0] if summary else '(no docstring)'}",
        f"ports: {', '.join(ports) or 'none'}",
        f"needs: {recorded}",
        f"reads of several images: {images}",
        f"stages: {', '.join(s for s in STAGES if s in cls.stages()) or 'none'}",
        f"identity at initialisation: {'yes' if cls.identity_at_init else 'no'}",
        f"not together with: {', '.join(cls.excludes) or '-'}",
        f"trains (M): {', '.join(counts)}",
    ]
    return "\n    ".join(lines)


def describe_models(pattern: str = "*") -> list[str]:
    """Return a line for each model that matches a glob: parameters of the backbone, latents, CLIP."""
    lines = []
    for name in list_models(pattern):
        entry = MODELS[name]
        count = sum(p.numel() for p in bare_model(name)[0].parameters()) / 1e6
        weights = "embedded weights" if entry.embedded else "random weights"
        lines.append(
            f"{name:10} {count:8.2f} M parameters, {entry.channels} latent channels, {entry.clip.model}, {weights}"
        )
    return lines


@cache
def bare_model(name: str) -> tuple[Backbone, TextEncoder, Dims]:
    """Return a model's parts without strategies, on the meta device: no memory, no values."""
    entry = MODELS[name]
    encoders = Encoders.of(entry.clip)
    with torch.device("meta"):
        backbone = build_backbone(
            entry.backbone, channels=entry.channels, text_dim=encoders.text, text_embed_dim=encoders.common
        )
        text = cast(TextEncoder, GivenText(encoders))
    return backbone, text, Dims(encoders.image, encoders.common, entry.channels, frames=16)


def trained(strategy: Strategy, backbone: Backbone) -> int:
    """Count the elements that some stage trains, of the strategy and of the backbone."""
    pairs = ((strategy, strategy.trains), (backbone, strategy.trains_backbone))
    return sum(
        p.numel()
        for module, globs in pairs
        for name, p in module.named_parameters()
        if any(fnmatchcase(name, glob) for stage in globs.values() for glob in stage)
    )
