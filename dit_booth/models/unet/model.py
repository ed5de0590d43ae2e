"""The video U-Net: Stable Diffusion 1.x's, inflated like VideoBooth's base model (arXiv 2312.00777, 3.1).

Parameter names are upstream's, so that Stable Diffusion's and VideoBooth's weights load unchanged; layers
that a strategy injects (``to_k_new``, ``to_k_global``, ...) belong to the strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import FrameCache, FramePlan
from dit_booth.inject import BlockGroup, Injection, Latents, Residuals, Site, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.frames import FrameLayout, beside, make_frame_cache
from dit_booth.models.layers import (
    Attention,
    TimestepEmbedding,
    frame_timesteps,
    name_linear_sites,
    with_context_frames,
)
from dit_booth.models.unet.blocks import (
    FrameConv,
    MidLevel,
    PointwiseFrameConv,
    ResnetBlock,
    TransformerBlock,
    UNetInputs,
    VideoNorm,
    VideoTransformer,
    build_levels,
    go_down,
    go_up,
)
from dit_booth.models.unet.config import UNetConfig

__all__ = ["UNetConfig", "VideoUNet"]


class VideoUNet(nn.Module):
    """x (b f c h w) at timestep t in [0, 1000) with text -> prediction (b f c h w).

    t is one of each video (b,), or of each of its frames (b f). The number of frames, height and width are free; t may
    be a float. ValueError: a shape does not fit.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config, self.plan = config, FramePlan(config.plan)
        self.temporal_plan = None if config.temporal_plan == "all" else FramePlan(config.temporal_plan)
        width = config.channels[0]
        down, up = build_levels("", config.channels, config.down_attention, config)
        self.conv_in = FrameConv(config.in_channels, width, kernel_size=3, padding=1)
        self.time_embedding = TimestepEmbedding("time_embedding", width, 4 * width)
        self.down_blocks = down
        self.mid_block = MidLevel("mid_block", config.channels[-1], config)
        self.up_blocks = up
        if config.watermark:
            widths = (width, config.channels[1], config.channels[1])
            down, up = build_levels("watermark_", widths, (False, False, False), config)
            self.watermark_down_blocks, self.watermark_up_blocks = down, up
            self.watermark_zero_out = PointwiseFrameConv(width, width)
        self.conv_norm_out = VideoNorm(config.norm_groups, width, eps=1e-5)
        self.conv_out = FrameConv(width, config.out_channels, kernel_size=3, padding=1)
        self.entry = Site(
            name="latents.entry", port="latents", role="entry", dim=config.in_channels, embed=self.conv_in
        )
        self.exit = Site(name="latents.exit", port="latents", role="exit", dim=config.out_channels)
        name_linear_sites(self)
        self.residual = Site(
            name="conv_in", port="residual", role="blocks", dim=width, groups=(self.way_down(config),)
        )
        self.initialise()

    def forward(self, x: Tensor, t: Tensor, text: Text, inject: Injection = no_injection) -> Tensor:
        latents = inject(self.entry, Latents(x, clip=inject.clip))
        x = latents.x
        self.validate(x, t, text.tokens)
        by_frame = frame_timesteps(t, x.shape[1] - latents.context, latents.context)
        t_emb = self.time_embedding(by_frame, x.dtype, inject)  # (f) b c
        shared = self.build_inputs(t_emb, text, latents, inject)
        x = self.conv_in(x) if latents.added is None else self.conv_in(x) + latents.added
        run = partial(self.run_copies, latents=latents, t_emb=t_emb, text=text)
        added = inject(self.residual, Residuals(to_tokens(x), latents.x, run)).added
        skips = go_down(self.down_blocks, x, shared)  # b f c h w, at falling resolution
        x = add_tokens(self.mid_block(skips[-1], shared), added.get(len(skips)))
        skips = [add_tokens(skip, added.get(i)) for i, skip in enumerate(skips)]
        x = go_up(self.up_blocks, x, skips, shared)
        if self.config.watermark:
            x = x + self.watermark(x, shared)
        x = self.conv_out(F.silu(self.conv_norm_out(x, latents.context)))
        return inject(self.exit, replace(latents, x=x)).x

    def build_inputs(self, t_emb: Tensor, text: Text, latents: Latents, inject: Injection) -> UNetInputs:
        """Build the inputs that all blocks share."""
        frames = FrameLayout.build(latents, self.plan, self.temporal_plan)
        riflex = frames.clip.riflex
        rotary = frames.positions if self.config.positions == "rotary" else None
        if riflex is not None and rotary is None:
            raise ValueError(
                "sample.long.riflex changes rotary frequencies, but unet.positions is none; use a model with"
                " unet.positions rotary, or set sample.long.riflex to 0"
            )
        return UNetInputs(
            t_emb, text.tokens, frames.plan, inject, latents.context, frames.temporal_plan, rotary, riflex
        )

    def run_copies(
        self, copies: Mapping[int, nn.Module], x: Tensor, *, latents: Latents, t_emb: Tensor, text: Text
    ) -> dict[int, Tensor]:
        """Run a copy of the way down on x with r reference frames before it (`Residuals.run`): ControlNet's branch."""
        references, height = x.shape[1] - latents.x.shape[1], latents.x.shape[-2]
        side = beside(latents, references)
        shared = self.build_inputs(with_context_frames(t_emb, references), text, side, no_injection)
        *down, mid = copies.values()
        skips = go_down(nn.ModuleList(down), rearrange(x, "b f (h w) c -> b f c h w", h=height), shared)
        return dict(enumerate(map(to_tokens, [*skips, mid(skips[-1], shared)])))

    def way_down(self, config: UNetConfig) -> BlockGroup:
        """Return what can be copied, whose outputs are the skips and the middle."""
        widths, last = [config.channels[0]], len(config.channels) - 1
        for i, width in enumerate(config.channels):
            widths += [width] * (config.layers_per_block + (i < last))
        blocks = [*self.down_blocks, self.mid_block]
        return BlockGroup(dict(enumerate(blocks)), dict(enumerate([*widths, config.channels[-1]])))

    def make_frame_cache(self) -> FrameCache:
        """Return an empty cache of past frames, for one noise level. ValueError: a plan reads later frames.

        Group norms pool the clip's frames only, so clips equal the whole video up to their statistics.
        """
        return make_frame_cache(self.sites(), self.plan, self.temporal_plan)

    def watermark(self, x: Tensor, shared: UNetInputs) -> Tensor:
        """Compute VideoBooth's residual before the head: a small U-Net without attention (golden)."""
        skips = go_down(self.watermark_down_blocks, x, shared)
        y: Tensor = self.watermark_zero_out(go_up(self.watermark_up_blocks, skips[-1], skips, shared))
        return y

    def sites(self) -> list[Site]:
        """Return every site of the backbone, in the order of the forward pass."""
        attentions = [module.site for module in self.modules() if isinstance(module, Attention)]
        return [self.entry, self.time_embedding.site, self.residual, *attentions, self.exit]

    def initialise(self) -> None:
        """Zero the last layer of every residual branch, and the output layer (latent diffusion).

        With zero temporal attention, the model starts as the inflated image model (Tune-A-Video).
        """
        zeroed: list[nn.Module] = [self.conv_out]
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zeroed.append(module.conv2)
            elif isinstance(module, VideoTransformer):
                zeroed.append(module.proj_out)
            elif isinstance(module, TransformerBlock):
                zeroed.append(module.attn_temp.to_out)
        if self.config.watermark:
            zeroed.append(self.watermark_zero_out)
        for parameter in (p for layer in zeroed for p in layer.parameters()):
            nn.init.zeros_(parameter)

    def validate(self, x: Tensor, t: Tensor, tokens: Tensor) -> None:
        """Raise ValueError if a shape does not fit the config or the batch."""
        channels, width = self.config.in_channels, self.config.text_dim
        if x.ndim != 5 or x.shape[2] != channels:
            raise ValueError(
                f"x is {tuple(x.shape)}; give (b f c h w) with c = {channels} (unet.in_channels)"
            )
        if t.shape[:1] != x.shape[:1]:
            raise ValueError(
                f"t is {tuple(t.shape)}; give one timestep per video ({x.shape[0]},), or one per frame"
            )
        if tokens.ndim != 3 or tokens.shape[0] != x.shape[0] or tokens.shape[-1] != width:
            raise ValueError(
                f"text.tokens is {tuple(tokens.shape)}; give (b l d) with b = {x.shape[0]}, the videos,"
                f" and d = {width} (unet.text_dim)"
            )


def to_tokens(x: Tensor) -> Tensor:
    """Return features (b f c h w) as tokens (b f n c)."""
    return rearrange(x, "b f c h w -> b f (h w) c")


def add_tokens(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Return features (b f c h w) with tokens (b f n c) added; as they are if there are none."""
    return x if tokens is None else x + rearrange(tokens, "b f (h w) c -> b f c h w", h=x.shape[-2])
