"""Image to video: the image is the video's first frame; its latents and a mask are further input channels.

Image-to-video weights of Wan (arXiv 2503.20314, section 5.1) have such channels, and keys of their own for states of
the image: they are given both, and nothing is new. On other weights the channels are new.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from dit_booth.inject import Condition, FirstFrame, Hidden, Latents, Reference, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

MARKS = 4
"""Channels of Wan's mask, one for each frame of a latent frame: all are 1 in the first, which stands alone."""


@dataclass(frozen=True, kw_only=True)
class ImageToVideoConfig(StrategyConfig):
    new_channels: bool = True
    """Weights that have no channels for the image get new ones, to be trained; false: such weights are an error."""


@register("image_to_video")
class ImageToVideo(Strategy):
    """The image is the video's first frame: its latents and a mask are further input channels (Wan)."""

    Config = ImageToVideoConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    trains_backbone = {"fine": ("*.attn1.*",), "joint": ("*.attn1.*",)}
    identity_at_init = True
    reads_first_frame = True
    excludes = ("spatial_concat",)  # the frames would be twice as high
    order = 1  # after a tap that puts references before the frames

    def __init__(self, config: ImageToVideoConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,) = sites.match("*", port="latents", role="entry")
        assert entry.embed is not None, "an entry site names the layer that embeds the latents"
        own = entry.embed.in_channels - entry.dim
        if own == MARKS + entry.dim:
            self.attach(entry, FillChannels())
            self.trains = {}
        elif own:
            raise ValueError(
                f"wan.condition_channels is {own}; strategy image_to_video fills {MARKS} of a mask and {entry.dim} of"
                " latents: give image-to-video weights, or choose another strategy"
            )
        elif config.new_channels:
            self.attach(entry, NewChannels(entry))
        else:
            raise ValueError(
                "image_to_video.new_channels is false, and these are text-to-video weights, without channels for an"
                " image; give those of an image-to-video pipeline, or set it to true and train the stage fine"
            )

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        first = reference.first_frame
        assert first is not None, "a strategy reads the first frame; set Reference.first_frame"
        mask = torch.zeros_like(first.latent[:, :, :1])
        mask[:, 0] = 1
        present = rearrange(reference.present, "b -> b 1 1 1 1")
        picture = torch.cat([mask, first.latent], dim=2) * present
        return Condition(shared=FirstFrame(picture, first.states))  # b k (1 c) h w


def in_frames(picture: Tensor, latents: Latents) -> Tensor:
    """Return a picture of the first k frames (b k c h w) in the pass's frames (b f c h w): zero in all others."""
    frames = range(latents.x.shape[1] - latents.context) if latents.clip is None else latents.clip.frames
    zero = torch.zeros_like(picture[:, 0])
    shown = [picture[:, i] if i < picture.shape[1] else zero for i in frames]
    return torch.stack([zero] * latents.context + shown, dim=1).to(latents.x.dtype)


class FillChannels(nn.Module):
    """Fill the channels that weights have behind the latents': those of the mask, then the image's latents."""

    def forward(self, latents: Latents, image: FirstFrame | None) -> Latents:
        if image is None:
            return latents
        picture = in_frames(image.latent, latents)
        mask = repeat(picture[:, :, :1], "b f 1 h w -> b f m h w", m=MARKS)
        return latents.filled(torch.cat([mask, picture[:, :, 1:]], dim=2), image.states)


class NewChannels(nn.Module):
    """The weights of c + 1 more input channels of the layer that embeds the latents; zero at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.embed = site.further_channels(site.dim + 1)

    def forward(self, latents: Latents, image: FirstFrame | None) -> Latents:
        if image is None:
            return latents
        picture = in_frames(image.latent, latents)
        embedded = self.embed(rearrange(picture, "b f c h w -> (b f) c h w"))
        return latents.adding(rearrange(embedded, "(b f) d h w -> b f d h w", b=len(picture)))
