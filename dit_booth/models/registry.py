"""Models by name: ``create_model("dit-nano", strategy="kv_concat")``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from dit_booth.errors import suggest
from dit_booth.inject import Dims
from dit_booth.models.assemble import BackboneConfig, assemble, build_backbone
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import build_clip
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.injected import Injected
from dit_booth.models.pretrained import load_pretrained
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.wan.model import WanConfig
from dit_booth.strategy import StrategyConfig

TINY = ClipConfig(model="dit-booth-tiny", pretrained="none")
VIT_L = ClipConfig(model="ViT-L-14-quickgelu", pretrained="none")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A backbone's configuration, the CLIP that it reads, and the channels of its latents."""

    backbone: BackboneConfig
    clip: ClipConfig
    channels: int
    embedded: bool = False  # the package brings trained weights


MODELS: Mapping[str, ModelEntry] = {
    # The toy world's, in pixels (configs/toyworld.yaml).
    "dit-nano": ModelEntry(
        backbone=DiTConfig(
            size="nano", plan="self+first+previous", positions="rotary", qk_norm=True, conv=True
        ),
        clip=TINY,
        channels=12,
        embedded=True,
    ),
    "dit-s": ModelEntry(backbone=DiTConfig(size="S"), clip=VIT_L, channels=4),
    "dit-b": ModelEntry(backbone=DiTConfig(size="B"), clip=VIT_L, channels=4),
    "dit-l": ModelEntry(backbone=DiTConfig(size="L"), clip=VIT_L, channels=4),
    "dit-xl": ModelEntry(backbone=DiTConfig(size="XL"), clip=VIT_L, channels=4),
    "unet-nano": ModelEntry(
        backbone=UNetConfig(
            channels=(24, 48),
            layers_per_block=1,
            heads=4,
            norm_groups=8,
            positions="rotary",
            down_attention=(False, True),
        ),
        clip=TINY,
        channels=12,
        embedded=True,
    ),
    "unet-sd": ModelEntry(backbone=UNetConfig(), clip=VIT_L, channels=4),
    "wan-nano": ModelEntry(backbone=WanConfig(), clip=TINY, channels=12),
    "wan-1.3b": ModelEntry(backbone=WanConfig(size="1.3b"), clip=VIT_L, channels=16),
    "wan-14b": ModelEntry(backbone=WanConfig(size="14b"), clip=VIT_L, channels=16),
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the models that match a glob."""
    return [name for name in MODELS if fnmatchcase(name, pattern)]


def create_model(
    name: str,
    strategy: str = "none",
    *,
    pretrained: bool = False,
    options: Mapping[str, StrategyConfig] | None = None,
    frames: int = 16,
    seed: int = 0,
) -> Injected:
    """Create a backbone with its text encoder and strategies (``a+b``) on the CPU.

    pretrained: with the embedded weights of the toy world (dit-nano, unet-nano); else all weights are random.
    options: of the strategies, by name. frames: of a training video. seed: of the strategies' random weights.
    ValueError: an unknown name, a strategy that does not fit, or no embedded weights.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} is unknown{suggest(name, MODELS)}")
    entry = MODELS[name]
    if pretrained and not entry.embedded:
        raise ValueError(
            f"no weights of {name} are embedded; use pretrained=False and load your own"
            f" (embedded: {', '.join(n for n, e in MODELS.items() if e.embedded)})"
        )
    text, image = build_clip(replace(entry.clip, pretrained="embedded" if pretrained else "none"))
    backbone = build_backbone(
        entry.backbone, channels=entry.channels, text_dim=text.width, text_embed_dim=text.embed_dim
    )
    if pretrained:
        load_pretrained(backbone, text, "embedded", name.partition("-")[0])
    dims = Dims(image.width, image.embed_dim, entry.channels, frames)
    return assemble(backbone, text, strategy, dims, options=options, seed=seed)
