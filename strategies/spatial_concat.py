"""Spatial concat: the clean reference lies below every frame, as one picture (CatVTON, arXiv 2407.15886)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from dit_booth.inject import QKV, AuxPrediction, Condition, Hidden, Latents, Reference, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register


@dataclass(frozen=True, kw_only=True)
class SpatialConcatConfig(AnchoredConfig):
    skip_text: bool = True
    """Leave the text attention out, as the paper does; false keeps the caption."""

    def __post_init__(self) -> None:
        self.check_anchors("spatial_concat")


@register("spatial_concat")
class SpatialConcat(Strategy):
    """The reference's latent stands below every frame's; only the cross-frame attention is trained (CatVTON)."""

    Config = SpatialConcatConfig
    trains_backbone = {"fine": ("*.attn1.*",), "joint": ("*.attn1.*",)}
    excludes = ("in_context",)  # it adds the same latent

    def __init__(self, config: SpatialConcatConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,), (leaving,) = (sites.match("*", port="latents", role=role) for role in ("entry", "exit"))
        self.attach(entry, PutBelow())
        self.attach(leaving, CutBelow())
        for site in sites.of(port="qkv", role="text") if config.skip_text else ():
            self.attach(site, SkipText())

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=reference.latent * rearrange(reference.present, "b -> b 1 1 1 1"))


def below(latent: Tensor, x: Tensor, readers: tuple[bool, ...] | None) -> Tensor:
    """Return the reference (b 1 c h w) in the size and number of the frames x (b f c h w); zeros where none reads."""
    picture = latent[:, 0]
    if picture.shape[-2:] != x.shape[-2:]:  # a square image prompt beside a wide video
        picture = F.interpolate(picture, x.shape[-2:], mode="bilinear", antialias=True)
    pictures = repeat(picture, "b c h w -> b f c h w", f=x.shape[1]).to(x.dtype)
    if readers is None:
        return pictures
    return pictures * rearrange(pictures.new_tensor(readers), "f -> f 1 1 1")


class PutBelow(nn.Module):
    """Concatenate [frame; reference] along the height."""

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        if image is None:
            return latents
        return replace(latents, x=torch.cat([latents.x, below(image, latents.x, latents.readers)], dim=-2))


class CutBelow(nn.Module):
    """Frames leave without the lower half; the loss is over both halves (the authors, CatVTON issue 14)."""

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        if image is None:
            return latents
        frames, rest = latents.x.chunk(2, dim=-2)
        truth = below(image, frames, latents.readers)
        return replace(latents, x=frames, aux_prediction=AuxPrediction(rest, truth))


class SkipText(nn.Module):
    """Skip the text attention (CatVTON), whichever frames the image reaches: its output is its input."""

    def forward(self, qkv: QKV, image: Tensor | None) -> QKV:
        return qkv if image is None else qkv.skipped()
