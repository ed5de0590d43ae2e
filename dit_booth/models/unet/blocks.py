"""Components of the video U-Net: Stable Diffusion 1.x's blocks, inflated as VideoBooth's base model is.

Convolutions see one frame at a time. The group norms of residual blocks pool their statistics over a video's
frames (upstream normalises a 3-D tensor), those of transformer blocks are per frame, as in the golden tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FrameIndices, Frames, Riflex
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Injection, Role
from dit_booth.models.layers import Attention, Linear, Sole
from dit_booth.models.positions import ImageRotary, Rotary, image_position, rotary_3d, rotary_frames
from dit_booth.models.unet.config import UNetConfig


class UNetInputs(NamedTuple):
    """Inputs that all blocks of one forward pass share."""

    t_emb: Tensor  # (f) b c, timestep embedding
    text: Tensor  # b l c
    plan: Frames  # of attn1
    inject: Injection
    context: int = 0  # leading frames outside the video
    temporal_plan: Frames | None = None  # of attn_temp; none: every frame reads every frame
    frame_positions: FrameIndices | None = None  # for rotary positions; none: attention knows no positions
    riflex: Riflex | None = None


# ---- layers ------------------------------------------------------------------------------------------------


class FrameConv(nn.Conv2d):
    """2-D convolution of every frame: (b f c h w)."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(rearrange(x, "b f c h w -> (b f) c h w"))
        return rearrange(y, "(b f) c h w -> b f c h w", f=x.shape[1])


class VideoNorm(nn.GroupNorm):
    """Group norm of (b f c h w) with statistics over all frames of a video; leading context frames have their own."""

    def forward(self, x: Tensor, context: int = 0) -> Tensor:
        if context:
            return torch.cat([self.forward(x[:, :context]), self.forward(x[:, context:])], dim=1)
        y = super().forward(rearrange(x, "b f c h w -> b c f h w"))
        return rearrange(y, "b c f h w -> b f c h w")


class PointwiseConv(nn.Conv2d):
    """Linear layer of tokens (... c) with weights in the shape of a 1x1 convolution, as in SD 1.x."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rearrange(self.weight, "o i 1 1 -> o i"), self.bias)


class PointwiseFrameConv(PointwiseConv):
    """1x1 convolution of every frame without moving the channels: (b f c h w)."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.flatten(1) @ x.flatten(-2) + rearrange(self.bias, "c -> c 1")
        return rearrange(y, "b f c (h w) -> b f c h w", h=x.shape[-2])


class Resample(nn.Module):
    """3x3 convolution that halves the side (stride 2), or follows nearest-neighbour scaling to `size`."""

    def __init__(self, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = FrameConv(dim, dim, kernel_size=3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None:  # the skip's size; twice the half of an odd side differs
            x = F.interpolate(x, size=(x.shape[2], *size), mode="nearest")
        y: Tensor = self.conv(x)
        return y


# ---- blocks ------------------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """Two convolutions with the timestep embedding added between them: (b f c h w)."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = VideoNorm(groups, dim, eps=1e-5)
        self.conv1 = FrameConv(dim, dim_out, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, dim_out)
        self.norm2 = VideoNorm(groups, dim_out, eps=1e-5)
        self.conv2 = FrameConv(dim_out, dim_out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == dim_out else PointwiseFrameConv(dim, dim_out)

    def forward(self, x: Tensor, shared: UNetInputs) -> Tensor:
        y: Tensor = self.conv1(F.silu(self.norm1(x, shared.context)))
        t_emb = self.time_emb_proj(F.silu(shared.t_emb))
        y = y + rearrange(t_emb, "b c -> b 1 c 1 1" if t_emb.ndim == 2 else "f b c -> b f c 1 1")
        y = self.conv2(F.silu(self.norm2(y, shared.context)))
        shortcut: Tensor = self.conv_shortcut(x)
        return shortcut + y


class UNetAttention(Attention):
    """`Attention` under Stable Diffusion's parameter name ``to_out.0``."""

    def __init__(self, name: str, role: Role, dim: int, source_dim: int, config: UNetConfig) -> None:
        rotary = config.positions == "rotary" and role != "text"
        super().__init__(name, role, dim, config.heads, source_dim, kernel=config.attention, rotary=rotary)
        self.add_module("to_out", Sole(self.to_out))


class GEGLU(nn.Module):
    """Linear unit gated by GELU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor, inject: Injection) -> Tensor:
        projected: Tensor = self.proj(x, inject)
        value, gate = projected.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated MLP of width 4c: (... c) -> (... c); ``net.1`` stands for upstream's dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), Linear(4 * dim, dim))

    def forward(self, x: Tensor, inject: Injection) -> Tensor:
        gated, _, down = self.net
        y: Tensor = down(gated(x, inject), inject)
        return y


class TransformerBlock(nn.Module):
    """Cross-frame attention by plan, text attention, a gated MLP, temporal attention; x: (b f n c)."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_temp = (nn.LayerNorm(dim) for _ in range(4))
        self.attn1 = UNetAttention(f"{name}.attn1", "cross_frame", dim, dim, config)
        self.attn2 = UNetAttention(f"{name}.attn2", "text", dim, config.text_dim, config)
        self.ff = FeedForward(dim)
        self.attn_temp = UNetAttention(f"{name}.attn_temp", "temporal", dim, dim, config)

    def forward(
        self,
        x: Tensor,
        shared: UNetInputs,
        rotary: Rotary | None = None,
        image_rotary: ImageRotary | None = None,
    ) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, shared.plan, shared.inject, rotary, image_rotary)
        text = rearrange(shared.text, "b l c -> b 1 l c")
        x = x + self.attn2(self.norm2(x), text, seen_by_all(x.shape[1]), shared.inject)
        x = x + self.ff(self.norm3(x), shared.inject)
        return x + self.attend_over_time(self.norm_temp(x), shared)

    def attend_over_time(self, x: Tensor, shared: UNetInputs) -> Tensor:
        """Temporal attention: the frames of one place are one group of keys or, under a plan, one group each."""
        whole, plan = shared.temporal_plan is None, shared.temporal_plan or seen_by_all(1)
        form = "(b n) 1 f c" if whole else "(b n) f 1 c"
        y: Tensor = rearrange(x, f"b f n c -> {form}")
        rotary: Rotary | None = None
        if shared.frame_positions is not None:
            width = x.shape[-1] // self.attn_temp.heads
            rotary = rotary_frames(
                shared.frame_positions,
                width,
                x.device,
                x.dtype,
                group_per_frame=not whole,
                riflex=shared.riflex,
            )
        y = self.attn_temp(y, y, plan, shared.inject, rotary)
        return rearrange(y, f"{form} -> b f n c", b=x.shape[0])


class VideoTransformer(nn.Module):
    """Transformer block between two projections, added to its input: (b f c h w)."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__()
        projection = nn.Linear if config.linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.proj_in = projection(dim, dim)
        self.heads = config.heads
        block = TransformerBlock(f"{name}.transformer_blocks.0", dim, config)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(dim, dim)

    def forward(self, x: Tensor, shared: UNetInputs) -> Tensor:
        b, _, _, h, w = x.shape
        y: Tensor = self.norm(rearrange(x, "b f c h w -> (b f) c h w"))
        y = self.proj_in(rearrange(y, "(b f) c h w -> b f (h w) c", b=b))
        rotary: Rotary | None = None
        image_rotary: ImageRotary | None = None
        if shared.frame_positions is not None:
            grid = (h, w, y.shape[-1] // self.heads, x.device, x.dtype, shared.riflex)
            rotary = rotary_3d(shared.frame_positions, *grid)
            own = image_position(shared.frame_positions, shared.context)
            image_rotary = ImageRotary.build(own, min(0, own), *grid)
        for block in self.transformer_blocks:
            y = block(y, shared, rotary, image_rotary)
        y = self.proj_out(y)
        return x + rearrange(y, "b f (h w) c -> b f c h w", h=h)


# ---- levels ------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """Residual blocks, each followed by a transformer where the level has attention.

    dims: input widths of the residual blocks; their output width is `dim_out`.
    """

    def __init__(self, name: str, dims: list[int], dim_out: int, config: UNetConfig, attentions: int) -> None:
        super().__init__()
        time_dim = 4 * config.channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim_out, time_dim, config.norm_groups) for dim in dims)
        self.attentions = nn.ModuleList(
            VideoTransformer(f"{name}.attentions.{j}", dim_out, config) for j in range(attentions)
        )
        self.checkpointing = config.checkpointing

    def layer(self, j: int, x: Tensor, shared: UNetInputs) -> Tensor:
        """Apply residual block j and its transformer, if there is one."""
        for module in (*self.resnets[j : j + 1], *self.attentions[j : j + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(module, x, shared, use_reentrant=False)
            else:
                x = module(x, shared)
        return x


class DownLevel(Level):
    """Level of the down path; returns its skips, the last of which is its output."""

    def __init__(
        self, name: str, dim: int, dim_out: int, config: UNetConfig, *, attends: bool, halves: bool
    ) -> None:
        layers = config.layers_per_block
        super().__init__(name, [dim] + [dim_out] * (layers - 1), dim_out, config, layers if attends else 0)
        self.downsamplers = nn.ModuleList([Resample(dim_out, stride=2)] if halves else [])

    def forward(self, x: Tensor, shared: UNetInputs) -> list[Tensor]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, shared)
            skips.append(x)
        skips.extend(half(x) for half in self.downsamplers)
        return skips


class MidLevel(Level):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__(name, [dim, dim], dim, config, attentions=1)

    def forward(self, x: Tensor, shared: UNetInputs) -> Tensor:
        return self.layer(1, self.layer(0, x, shared), shared)


class UpLevel(Level):
    """Level of the up path; takes its skips from the end, and scales to the next level's size.

    skips: their widths, in the order in which they are taken. ``forward`` must not change its arguments: ZeRO-3 passes
    a module copies of its list arguments.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        skips: list[int],
        dim_out: int,
        config: UNetConfig,
        *,
        attends: bool,
        doubles: bool,
    ) -> None:
        entering = [dim] + [dim_out] * (len(skips) - 1)
        dims = [width + skip for width, skip in zip(entering, skips, strict=True)]
        super().__init__(name, dims, dim_out, config, len(skips) if attends else 0)
        self.upsamplers = nn.ModuleList([Resample(dim_out)] if doubles else [])

    def forward(self, x: Tensor, skips: list[Tensor], size: tuple[int, int], shared: UNetInputs) -> Tensor:
        for j, skip in enumerate(reversed(skips)):
            x = self.layer(j, torch.cat([x, skip], dim=2), shared)  # b f c h w
        for double in self.upsamplers:
            x = double(x, size=size)
        return x


def build_levels(
    prefix: str, widths: tuple[int, ...], attention: tuple[bool, ...], config: UNetConfig
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Build the down and up paths of a U-Net whose levels have these widths, from full resolution down."""
    down, up, last = nn.ModuleList(), nn.ModuleList(), len(widths) - 1
    dim, skips = widths[0], [widths[0]]
    for i, width in enumerate(widths):
        level = f"{prefix}down_blocks.{i}"
        down.append(DownLevel(level, dim, width, config, attends=attention[i], halves=i < last))
        skips += [width] * (config.layers_per_block + (i < last))
        dim = width
    for i, width in enumerate(reversed(widths)):
        level, attends = f"{prefix}up_blocks.{i}", attention[last - i]
        taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
        up.append(UpLevel(level, dim, taken, width, config, attends=attends, doubles=i < last))
        dim = width
    return down, up


def go_down(levels: nn.ModuleList, x: Tensor, shared: UNetInputs) -> list[Tensor]:
    """Return x (b f c h w) and all skips, at falling resolution; the up path starts from the last."""
    skips = [x]
    for level in levels:
        skips += level(skips[-1], shared)
    return skips


def go_up(levels: nn.ModuleList, x: Tensor, skips: list[Tensor], shared: UNetInputs) -> Tensor:
    """Return to full resolution, using the `skips` from the end."""
    for level in levels:
        assert isinstance(level, UpLevel)
        rest = len(skips) - len(level.resnets)
        height, width = skips[max(rest - 1, 0)].shape[-2:]  # of the next level
        x = level(x, skips[rest:], (height, width), shared)
        skips = skips[:rest]
    return x
