"""LVDM's mask channel: the network is told which frames are known (arXiv 2211.13221, section 3.3).

The known frames stand in the latents at a noise level of their own, which is embedded as their timestep; a further
input channel marks them. Which frames those are is drawn in training (section `known`), and follows when clips continue
each other (section `clips`).
"""

import torch
from einops import rearrange, repeat
from torch import nn

from dit_booth.inject import Latents, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register


@register("lvdm")
class KnownFrames(Strategy):
    """A further input channel marks known frames; the whole backbone learns to predict the others from them (LVDM)."""

    trains = {"fine": ("*",), "joint": ("*",)}
    trains_backbone = {"fine": ("*",), "joint": ("*",)}
    identity_at_init = True
    reads_image = False
    reads_known_frames = True
    order = 1  # after a tap that puts the reference before the frames or below them

    def __init__(self, config: StrategyConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,) = sites.match("*", port="latents", role="entry")
        self.attach(entry, MaskChannel(entry))


class MaskChannel(nn.Module):
    """The weights of one more input channel of the layer that embeds the latents; zero at the start."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.embed = site.further_channels(1)

    def forward(self, latents: Latents, image: object) -> Latents:
        if latents.known is None:
            return latents
        frames, (height, width) = latents.x.shape[1], latents.x.shape[-2:]
        outside = latents.known.new_zeros(len(latents.x), latents.context, 1, 1, 1)
        mask = torch.cat([outside, latents.known], dim=1).to(latents.x.dtype)
        channel = repeat(mask, "b f 1 1 1 -> (b f) 1 h w", h=height, w=width)
        return latents.adding(rearrange(self.embed(channel), "(b f) d h w -> b f d h w", f=frames))
