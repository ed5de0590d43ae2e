"""The list of strategies: ``python -m dit_booth.cost.catalogue [--plugin FILE ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from dit_booth.config import STAGES
from dit_booth.config.parse import load_plugin
from dit_booth.inject import Site, Sites
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.strategy import Strategy, aliases, failed_plugins, registered

Backbone = VideoDiT | VideoUNet
TINY = {"text": 128, "text_embed": 128, "image": 96, "image_embed": 128, "channels": 27}
"""Widths of the toy world's encoders (dit-booth-tiny, pixels in patches of 3)."""
REAL = {"text": 768, "text_embed": 768, "image": 1024, "image_embed": 768, "channels": 4}
"""Widths of CLIP ViT-L/14 and Stable Diffusion's autoencoder."""
UNET_NANO = UNetConfig(
    channels=(24, 48), layers_per_block=1, heads=4, norm_groups=8, down_attention=(False, True), text_dim=128
)
"""The toy world's (experiments/configs/toyworld.yaml)."""


def backbones() -> Iterator[tuple[str, Backbone, Sites]]:
    """Name, network on the meta device (no memory, no numbers) and sites, at each size."""
    for size in ("nano", "S", "B", "L", "XL"):
        widths = TINY if size == "nano" else REAL
        with torch.device("meta"):
            dit = VideoDiT(
                DiTConfig(size=size),  # type: ignore[arg-type]
                channels=widths["channels"],
                text_dim=widths["text"],
                text_embed_dim=widths["text_embed"],
            )
        yield f"DiT-{size}", dit, _sites(dit, widths)
    for name, config, widths in (("U-Net nano", UNET_NANO, TINY), ("U-Net SD", UNetConfig(), REAL)):
        with torch.device("meta"):
            unet = VideoUNet(config)
        yield name, unet, _sites(unet, widths)


def _sites(backbone: Backbone, widths: Mapping[str, int]) -> Sites:
    words = Site(name="text.prompt", port="prompt", role="words", dim=widths["text"])
    return Sites(
        (words, *backbone.sites()), widths["image"], widths["image_embed"], widths["channels"], frames=16
    )


def trained(strategy: Strategy, backbone: Backbone) -> int:
    """Numbers that some stage trains, the strategy's own and the backbone's."""
    pairs = ((strategy, strategy.trains), (backbone, strategy.trains_backbone))
    return sum(
        p.numel()
        for module, globs in pairs
        for name, p in module.named_parameters()
        if any(fnmatchcase(name, glob) for stage in globs.values() for glob in stage)
    )


def describe(cls: type[Strategy], models: Sequence[tuple[str, Backbone, Sites]]) -> str:
    """One strategy's entry, with the default options."""
    ports: dict[str, None] = {}
    counts = []
    for name, backbone, sites in models:
        with torch.device("meta"):
            strategy = cls(cls.Config(), sites)
        ports |= dict.fromkeys(site.port for site in sites if site.name in strategy.attached)
        counts.append(f"{name} {_millions(trained(strategy, backbone))}")
    summary = (cls.__doc__ or "").strip().splitlines()
    lines = [
        f"{cls.name}: {summary[0] if summary else '(no docstring)'}",
        f"ports: {', '.join(ports) or 'none'}",
        f"stages: {', '.join(s for s in STAGES if s in cls.stages()) or 'none'}",
        f"identity at initialisation: {'yes' if cls.identity_at_init else 'no'}",
        f"not together with: {', '.join(cls.excludes) or '-'}",
        f"trains (M): {', '.join(counts)}",
    ]
    return "\n    ".join(lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m dit_booth.cost.catalogue", description=__doc__)
    options.add_argument(
        "--plugin", nargs="*", default=[], help="Python files that register further strategies"
    )
    given = options.parse_args(argv)
    registered()  # the installed ones first, as in a run
    for path in given.plugin:
        load_plugin(path)
    models = list(backbones())
    entries = [describe(cls, models) for cls in registered().values()]
    entries += [f"{name}: stands for {expression}" for name, expression in aliases().items()]
    entries += [f"plug-in {name} failed to import: {line}" for name, line in failed_plugins().items()]
    sys.stdout.write("\n".join(entries) + "\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
