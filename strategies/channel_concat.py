"""Channel concat: the references and a mask of their places are further input channels (MAGREF, arXiv 2505.23742)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.anchors import At
from dit_booth.inject import Condition, Hidden, Latents, Reference, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register


@dataclass(frozen=True, kw_only=True)
class ChannelConcatConfig(AnchoredConfig):
    reference_at: At = "first"
    """Frames whose further channels hold the references: the first (MAGREF), keyframes, or all; others hold zeros."""

    def __post_init__(self) -> None:
        self.check_anchors("channel_concat")


class Pictures(NamedTuple):
    """Latents of the image prompts, and which of them are there."""

    latents: Tensor  # b r c h w
    present: Tensor  # b r, boolean


@register("channel_concat")
class ChannelConcat(Strategy):
    """The references' latents, side by side, and a mask of their places are further input channels (MAGREF)."""

    Config = ChannelConcatConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    trains_backbone = {"fine": ("*.attn1.*",), "joint": ("*.attn1.*",)}
    identity_at_init = True
    reads_all_images = True
    excludes = ("spatial_concat",)  # it adds the same latent, and the frames would be twice as high
    order = 1  # after a tap that puts references before the frames

    def __init__(self, config: ChannelConcatConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,) = sites.match("*", port="latents", role="entry")
        self.attach(entry, FurtherChannels(entry))

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        latents = torch.cat([each.latent for each in reference.all], dim=1)
        present = torch.stack([each.present for each in reference.all], dim=1)
        return Condition(shared=Pictures(latents, present))


def lay_out(pictures: Pictures, height: int, width: int) -> Tensor:
    """Return the pictures and the mask of their places as one picture (b (c 1) height width), zero elsewhere.

    One to three stand side by side, four in a square (MAGREF), each as large as its cell allows, in the middle.
    """
    b, r, c, *_ = pictures.latents.shape
    rows, columns = (2, (r + 1) // 2) if r > 3 else (1, r)
    cell = (height // rows, width // columns)
    canvas = pictures.latents.new_zeros(b, c + 1, height, width)
    masked = F.pad(pictures.latents, (0, 0, 0, 0, 0, 1), value=1.0)  # b r (c 1) h w
    masked = masked * rearrange(pictures.present, "b r -> b r 1 1 1")
    for place, picture in enumerate(masked.unbind(1)):
        scale = min(cell[0] / picture.shape[-2], cell[1] / picture.shape[-1])
        h, w = (max(1, round(scale * side)) for side in picture.shape[-2:])
        if (h, w) != tuple(picture.shape[-2:]):
            picture = F.interpolate(picture, (h, w), mode="bilinear", antialias=True)
        row, column = divmod(place, columns)
        top, left = row * cell[0] + (cell[0] - h) // 2, column * cell[1] + (cell[1] - w) // 2
        canvas[:, :, top : top + h, left : left + w] = picture
    return canvas


class FurtherChannels(nn.Module):
    """The weights of c + 1 more input channels of the layer that embeds the latents; zero at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        assert site.embed is not None, "an entry site names the layer that embeds the latents"
        like = site.embed
        self.embed = nn.Conv2d(  # type: ignore[misc]
            site.dim + 1, like.out_channels, like.kernel_size, like.stride, like.padding, bias=False
        )
        nn.init.zeros_(self.embed.weight)

    def forward(self, latents: Latents, image: Pictures | None) -> Latents:
        if image is None:
            return latents
        picture = lay_out(image, *latents.x.shape[-2:]).to(latents.x.dtype)
        embedded = rearrange(self.embed(picture), "b d h w -> b 1 d h w")
        frames = latents.x.shape[1] - latents.context
        reads = (False,) * latents.context + (latents.readers or (True,) * frames)
        return latents.adding(embedded * rearrange(embedded.new_tensor(reads), "f -> f 1 1 1"))
