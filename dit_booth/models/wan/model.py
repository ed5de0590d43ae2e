"""Wan 2.1 (arXiv 2503.20314): a diffusion transformer whose frames read each other and the text.

Parameter names are those of diffusers' ``WanTransformer3DModel``, whose folders load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FrameCache, FramePlan
from dit_booth.inject import BlockGroup, Injection, Latents, Residuals, Site, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.frames import FrameLayout, beside, make_frame_cache
from dit_booth.models.layers import (
    TimestepEmbedding,
    compile_each,
    frame_timesteps,
    name_linear_sites,
    with_context_frames,
)
from dit_booth.models.modulation import ShiftScaleGate
from dit_booth.models.positions import ImageRotary, image_position, rotary_3d
from dit_booth.models.wan.blocks import FeedForward, WanBlock, WanInputs, WideLayerNorm, wide
from dit_booth.models.wan.config import SIZES, WanConfig

__all__ = ["SIZES", "VideoWan", "WanConfig"]

FREQUENCIES = 256
"""Width of the timestep's sinusoidal embedding."""
FLOAT32_PARTS = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
"""Parts of parameter names that stay in float32 in a network of lower precision, as diffusers keeps them."""


class VideoWan(nn.Module):
    """x (b f c h w) at timestep t in [0, 1000] with text -> prediction (b f c h w).

    t is one of each video (b,), or of each of its frames (b f). Frames are free in number, height and width if the
    patch divides them. x may have the `condition_channels` behind its own; else they are zeros. `text_dim`: width of
    the text tokens (umT5: 4096). `out_channels`: channels of the prediction, if not those of x.
    """

    def __init__(
        self, config: WanConfig, *, channels: int, text_dim: int, out_channels: int | None = None
    ) -> None:
        super().__init__()
        depth, hidden, _, _ = config.shape
        out_channels = out_channels or channels
        self.config, self.plan, self.text_dim = config, FramePlan(config.plan), text_dim
        self.temporal_plan: FramePlan | None = None  # no temporal attention
        self.patch_embedding = PatchEmbedding(channels, config.condition_channels, hidden, config.patch)
        self.condition_embedder = ConditionEmbedder(config, text_dim)
        self.blocks = nn.ModuleList(WanBlock(f"blocks.{i}", config) for i in range(depth))
        self.norm_out = WideLayerNorm(hidden, eps=1e-6, elementwise_affine=False)
        self.proj_out = nn.Linear(hidden, out_channels * config.patch**2)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, hidden) / hidden**0.5)
        self.entry = Site(
            name="latents.entry", port="latents", role="entry", dim=channels, embed=self.patch_embedding
        )
        self.exit = Site(name="latents.exit", port="latents", role="exit", dim=out_channels)
        groups = tuple(BlockGroup({i: block}, {i: hidden}) for i, block in enumerate(self.blocks))
        self.residual = Site(
            name="patch_embedding", port="residual", role="blocks", dim=hidden, groups=groups
        )
        name_linear_sites(self)
        self.initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Text,
        inject: Injection = no_injection,
        image: Tensor | None = None,
    ) -> Tensor:
        """image: b m e with e = `image_dim`, CLIP states that image-to-video weights read; none: no image."""
        latents = inject(self.entry, Latents(x, clip=inject.clip, image=image))
        height, width = latents.x.shape[-2:]
        by_frame = frame_timesteps(t, latents.x.shape[1] - latents.context, latents.context)
        t_emb = self.condition_embedder.time_embedder(by_frame, x.dtype, inject)  # (f) b d
        shared = self.build_inputs(latents, t_emb, text, inject)
        x = self.patch_embedding(latents.x, latents.added)  # b f n d
        run = partial(self.run_copies, latents=latents, t_emb=t_emb, text=text)
        added = inject(self.residual, Residuals(x, latents.x, run)).added
        for i, block in enumerate(self.blocks):
            x = self.run_block(i, block, x, shared, inject.inside(f"blocks.{i}"))
            x = x + added[i] if i in added else x
        x = self.head(x, t_emb, height, width)
        return inject(self.exit, replace(latents, x=x)).x

    def build_inputs(self, latents: Latents, t_emb: Tensor, text: Text, inject: Injection) -> WanInputs:
        """Build the inputs that all blocks share. ValueError: windows of temporal attention, which Wan has not."""
        frames = FrameLayout.build(latents, self.plan, self.temporal_plan)
        if frames.clip.fusion is not None:
            raise ValueError(
                "sample.long.kind is freenoise, which averages windows of temporal attention; Wan has none: choose"
                " chunks or diffusion_forcing"
            )
        own = image_position(frames.positions, latents.context)
        place = {"before": min(0, own) - 1, "first": own, "after": max(frames.positions) + 1}
        reference = place[self.config.reference_place]
        x, dim = latents.x, self.config.shape.hidden // self.config.shape.heads
        height, width = (n // self.config.patch for n in x.shape[-2:])
        grid = (height, width, dim, x.device, x.dtype, frames.clip.riflex)
        rotary = rotary_3d(frames.positions, *grid, interleaved=True)
        image_rotary = ImageRotary.build(reference, min(0, own), *grid, interleaved=True)
        modulation, words, picture = self.condition_embedder(t_emb, text.tokens, latents.image, inject)
        return WanInputs(modulation, words, picture, frames.plan, rotary, image_rotary)

    def run_block(self, i: int, block: nn.Module, x: Tensor, shared: WanInputs, inject: Injection) -> Tensor:
        """Run block i; with checkpointing, recompute it in the backward pass."""
        recomputed = self.config.checkpointing and i % self.config.checkpoint_every == 0
        out: Tensor
        if recomputed and torch.is_grad_enabled():
            out = checkpoint(block, x, shared, inject, use_reentrant=False)
        else:
            out = block(x, shared, inject)
        return out

    def run_copies(
        self, copies: Mapping[int, nn.Module], x: Tensor, *, latents: Latents, t_emb: Tensor, text: Text
    ) -> dict[int, Tensor]:
        """Run copies of blocks on x with r reference frames before it (`Residuals.run`)."""
        references = x.shape[1] - latents.x.shape[1]
        side = beside(latents, references)
        shared = self.build_inputs(side, with_context_frames(t_emb, references), text, no_injection)
        outputs: dict[int, Tensor] = {}
        for i, block in copies.items():
            x = outputs[i] = self.run_block(i, block, x, shared, no_injection)
        return outputs

    def head(self, x: Tensor, t_emb: Tensor, height: int, width: int) -> Tensor:
        """Norm, modulation by the timestep embedding itself, and projection of tokens (b f n d) back to latents."""
        vector = repeat(wide(t_emb), "... d -> ... (e d)", e=2) + self.scale_shift_table.flatten()
        (mod,) = ShiftScaleGate.split(vector, 1, 2)
        x = self.proj_out(mod.modulate(self.norm_out(x)).to(x.dtype))
        p = self.config.patch
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)

    def make_frame_cache(self) -> FrameCache:
        """Return an empty cache of past frames, for one noise level. ValueError: the plan reads later frames."""
        return make_frame_cache(self.sites(), self.plan, self.temporal_plan)

    def compile_blocks(self, **options: object) -> None:
        """Compile each block with torch.compile (`compile_each`)."""
        compile_each(self.blocks, **options)

    def sites(self) -> list[Site]:
        """Return every site of the backbone, in the order of the forward pass."""
        blocks = [site for block in self.blocks if isinstance(block, WanBlock) for site in block.sites()]
        return [self.entry, self.condition_embedder.time_embedder.site, self.residual, *blocks, self.exit]

    @torch.no_grad()
    def to_precision(self, dtype: torch.dtype) -> Self:
        """Cast the parameters, but for `FLOAT32_PARTS`, as diffusers' ``from_pretrained`` does; ``.to`` casts all."""
        for name, parameter in self.named_parameters():
            if FLOAT32_PARTS.isdisjoint(name.split(".")):
                parameter.data = parameter.to(dtype)
        return self

    def initialise(self) -> None:
        """Initialise as the original: Xavier-uniform layers, small embeddings, a zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedder in (self.condition_embedder.time_embedder, self.condition_embedder.text_embedder):
            for module in embedder.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)


class PatchEmbedding(nn.Conv3d):
    """Embed latent patches of one frame each as tokens (b f n d)."""

    def __init__(self, channels: int, condition_channels: int, hidden: int, patch: int) -> None:
        sides = (1, patch, patch)
        super().__init__(channels + condition_channels, hidden, sides, sides)
        self.patch, self.channels = patch, channels

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Latents (b f c h w) -> tokens (b f n d), with zeros for condition channels that x has not.

        added: b f d h w, of the tokens' grid, to add to the embedded patches. ValueError: a shape does not fit.
        """
        frames, channels, height, width = x.shape[1:]
        patch = self.patch
        if channels not in (self.channels, self.in_channels):
            raise ValueError(
                f"x is {tuple(x.shape)}; give (b f c h w) with c = {self.channels}, or {self.in_channels} with the"
                " condition channels (wan.condition_channels)"
            )
        if height % patch or width % patch:
            raise ValueError(
                f"latents of {height} x {width} cannot be cut into patches of {patch}; change wan.patch or data.size"
            )
        x = rearrange(x, "b f c h w -> (b f) c h w")
        x = F.pad(x, (0, 0, 0, 0, 0, self.in_channels - channels))
        tokens = F.conv2d(x, rearrange(self.weight, "o i 1 p q -> o i p q"), self.bias, patch)
        if added is not None:
            tokens = tokens + rearrange(added, "b f d h w -> (b f) d h w")
        return rearrange(tokens, "(b f) d h w -> b f (h w) d", f=frames).contiguous()


class ConditionEmbedder(nn.Module):
    """Embed timestep, text and image for the blocks."""

    def __init__(self, config: WanConfig, text_dim: int) -> None:
        super().__init__()
        hidden = config.shape.hidden
        self.time_embedder = TimestepEmbedding("condition_embedder.time_embedder", FREQUENCIES, hidden)
        self.time_proj = nn.Linear(hidden, 6 * hidden)
        self.text_embedder = TextEmbedder(text_dim, hidden)
        self.image_embedder = ImageEmbedder(config.image_dim, hidden) if config.image_dim else None

    def forward(
        self, t_emb: Tensor, text: Tensor, image: Tensor | None, inject: Injection
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """t_emb (f) b d, text b l c, image b m e -> modulation (f) b 6d, and groups of keys b 1 l d, b 1 m d.

        ValueError: an image for weights that read none.
        """
        modulation, words = self.time_proj(F.silu(t_emb)), self.text_embedder(text)
        keys = rearrange(words, "b l d -> b 1 l d")
        if image is None:
            return modulation, keys, None
        if self.image_embedder is None:
            raise ValueError(
                "image states were given, but wan.image_dim is 0: text-to-video weights read none; leave them out, or"
                " load image-to-video weights"
            )
        return modulation, keys, rearrange(self.image_embedder(image, inject), "b m d -> b 1 m d")


class TextEmbedder(nn.Module):
    """Two layers with a GELU (tanh) between: (b l c) -> (b l d)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, hidden), nn.Linear(hidden, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """ValueError: the tokens are of another text encoder."""
        width = self.linear_1.in_features
        if tokens.shape[-1] != width:
            raise ValueError(
                f"text.tokens is {tuple(tokens.shape)}; give (b l c) with c = {width}, the width of the text encoder"
                " that these weights read"
            )
        y: Tensor = self.linear_2(F.gelu(self.linear_1(tokens), approximate="tanh"))
        return y


class ImageEmbedder(nn.Module):
    """MLP between two norms: CLIP states (b m e) -> (b m d)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = WideLayerNorm(dim), WideLayerNorm(hidden)
        self.ff = FeedForward(dim, dim, hidden, approximate="none")

    def forward(self, states: Tensor, inject: Injection = no_injection) -> Tensor:
        y: Tensor = self.norm2(self.ff(self.norm1(states).to(states.dtype), inject))
        return y.to(states.dtype)
