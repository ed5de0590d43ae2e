"""VACE: a side branch of copied blocks reads the references; what it finds is added to the frozen blocks' outputs.

VACE (arXiv 2503.07598, section 3.3.2) without its control video: the reference frames stand before the video's in the
branch alone, whose blocks start as the backbone's, behind layers that start at zero (ControlNet, arXiv 2302.05543).
"""

import copy
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.errors import check_ranges
from dit_booth.inject import Condition, Hidden, Reference, Residuals, Site, Sites
from dit_booth.strategy import Strategy, StrategyConfig, register

from .parts.frames import latents_of, resized


@dataclass(frozen=True, kw_only=True)
class VACEConfig(StrategyConfig):
    every: int = 1
    """Copy every k-th block (Wan 2.1's 1.3B: 2 of 30, 14B: 5 of 40). A U-Net's way down is copied as a whole."""

    def __post_init__(self) -> None:
        check_ranges(self, "vace", every="[1, 1000]")


@register("vace")
class VACE(Strategy):
    """A side branch of copied blocks reads the references beside the video, and adds to the blocks' outputs (VACE)."""

    Config = VACEConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    identity_at_init = True
    reads_all_images = True

    def __init__(self, config: VACEConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,) = sites.match("*", port="latents", role="entry")
        (blocks,) = sites.match("*", port="residual")
        self.attach(blocks, SideBranch(entry, blocks, config.every))

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=latents_of(reference, mask=True))  # b r (c 1) h w


class SideBranch(nn.Module):
    """Copies of blocks on [references; video], and a layer after each that starts at zero."""

    def __init__(self, entry: Site, blocks: Site, every: int) -> None:
        super().__init__()
        own = entry.embed
        self.embed = entry.embedding_of(entry.dim + 1, bias=True)
        assert own is not None and own.bias is not None and self.embed.bias is not None
        with torch.no_grad():  # a reference enters as a frame does; the mask has no effect yet
            weight = entry.embedding_weight()
            self.embed.weight.copy_(torch.cat([weight, torch.zeros_like(weight[:, :1])], dim=1))
            self.embed.bias.copy_(own.bias)
        groups = blocks.groups[::every]
        copied = {i: block for group in groups for i, block in group.blocks.items()}
        self.copies = nn.ModuleDict(
            {str(i): copy.deepcopy(block).requires_grad_(True) for i, block in copied.items()}
        )
        self.to_residual = nn.ModuleDict(
            {
                str(place): nn.Linear(width, width)
                for group in groups
                for place, width in group.outputs.items()
            }
        )
        for parameter in self.to_residual.parameters():
            nn.init.zeros_(parameter)

    def forward(self, residuals: Residuals, image: Tensor | None) -> Residuals:
        if image is None:
            return residuals
        frames = resized(image, residuals.latents)
        embedded = self.embed(rearrange(frames, "b r c h w -> (b r) c h w"))
        references = rearrange(embedded, "(b r) d h w -> b r (h w) d", b=len(frames))
        copies = {int(i): block for i, block in self.copies.items()}
        outputs = residuals.run(copies, torch.cat([references, residuals.x], dim=1))
        hints = {
            int(place): layer(outputs[int(place)][:, frames.shape[1] :])
            for place, layer in self.to_residual.items()
        }
        return residuals.adding(hints)
