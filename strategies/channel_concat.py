"""Channel concat: the references and a mask of their places are further input channels (MAGREF, arXiv 2505.23742)."""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from dit_booth.anchors import At
from dit_booth.inject import Condition, Hidden, Latents, Reference, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register

from .parts.frames import latents_of, side_by_side


@dataclass(frozen=True, kw_only=True)
class ChannelConcatConfig(AnchoredConfig):
    reference_at: At = "first"
    """Frames whose further channels hold the references: the first (MAGREF), keyframes, or all; others hold zeros."""

    def __post_init__(self) -> None:
        self.check_anchors("channel_concat")


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
        return Condition(shared=latents_of(reference, mask=True))  # b r (c 1) h w


class FurtherChannels(nn.Module):
    """The weights of c + 1 more input channels of the layer that embeds the latents; zero at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.embed = site.further_channels(site.dim + 1)

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        if image is None:
            return latents
        picture = side_by_side(image, *latents.x.shape[-2:]).to(latents.x.dtype)
        embedded = rearrange(self.embed(picture), "b d h w -> b 1 d h w")
        frames = latents.x.shape[1] - latents.context
        reads = (False,) * latents.context + (latents.readers or (True,) * frames)
        return latents.adding(embedded * rearrange(embedded.new_tensor(reads), "f -> f 1 1 1"))
