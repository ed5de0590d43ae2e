"""Components of the video U-Net: Stable Diffusion 1.x's blocks, inflated as VideoBooth's base model is.

Convolutions see one frame at a time. The group norms of residual blocks pool their statistics over a video's
frames (upstream norms a 3-D tensor), those of transformer blocks are per frame; the golden tensors say so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import Frames
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Injection, Modulation, Role, Site
from dit_booth.models.layers import Attention, timestep_embedding
from dit_booth.models.positions import Rotary, rotary_3d, rotary_time
from dit_booth.models.unet.config import UNetConfig


class Step(NamedTuple):
    """What every block of one forward pass reads."""

    time: Tensor  # b c
    text: Tensor  # b l c
    plan: Frames
    inject: Injection
    context: int = 0  # leading frames that are no part of the video
    time_plan: Frames | None = None  # which frames of a place read which, where that is not all
    times: range | None = None  # the frames' positions, where attention knows them


# ---- layers ------------------------------------------------------------------------------------------------


class FrameConv(nn.Conv2d):
    """A 2-D convolution of every frame: (b f c h w)."""

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
    """A linear layer of tokens (... c) whose weights have a 1x1 convolution's shape, as in SD 1.x."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__(dim, dim_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, rearrange(self.weight, "o i 1 1 -> o i"), self.bias)


class PointwiseFrameConv(PointwiseConv):
    """The same of every frame where the channels lie: (b f c h w)."""

    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        y = self.weight.flatten(1) @ x.flatten(-2) + rearrange(self.bias, "c -> c 1")
        return rearrange(y, "b f c (h w) -> b f c h w", h=x.shape[-2])


class TimeEmbedding(nn.Module):
    """t (b,) -> (b dim) through the `modulation` port, whose source is the sinusoidal embedding (b width)."""

    def __init__(self, name: str, width: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.width = width
        self.site = Site(name=name, port="modulation", role="time", dim=dim)

    def forward(self, t: Tensor, dtype: torch.dtype, inject: Injection) -> Tensor:
        source = timestep_embedding(t, self.width).to(dtype)
        time = self.linear_2(F.silu(self.linear_1(source)))
        return inject(self.site, Modulation(time, source)).vector


class Resample(nn.Module):
    """A 3x3 convolution that halves the side (stride 2), or follows nearest-neighbour scaling to `size`."""

    def __init__(self, dim: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = FrameConv(dim, dim, kernel_size=3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is not None:  # the skip's size: a side that was odd is not twice its half
            x = F.interpolate(x, size=(x.shape[2], *size), mode="nearest")
        return self.conv(x)


# ---- blocks ------------------------------------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding between them: (b f c h w)."""

    def __init__(self, dim: int, dim_out: int, time_dim: int, groups: int) -> None:
        super().__init__()
        self.norm1 = VideoNorm(groups, dim, eps=1e-5)
        self.conv1 = FrameConv(dim, dim_out, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, dim_out)
        self.norm2 = VideoNorm(groups, dim_out, eps=1e-5)
        self.conv2 = FrameConv(dim_out, dim_out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Identity() if dim == dim_out else PointwiseFrameConv(dim, dim_out)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x, step.context)))
        y = y + rearrange(self.time_emb_proj(F.silu(step.time)), "b c -> b 1 c 1 1")
        y = self.conv2(F.silu(self.norm2(y, step.context)))
        return self.conv_shortcut(x) + y


class UNetAttention(Attention):
    """`Attention` under Stable Diffusion's parameter name ``to_out.0``."""

    def __init__(self, name: str, role: Role, dim: int, source_dim: int, config: UNetConfig) -> None:
        super().__init__(name, role, dim, config.heads, source_dim, kernel=config.attention)
        self.add_module("to_out", nn.Sequential(self.to_out))


class GEGLU(nn.Module):
    """Linear unit gated by GELU (Shazeer 2020)."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """(... c) -> (... c) through 4c gated units; ``net.1`` is where upstream has its dropout."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention over frames by plan, over the text, a feed-forward, attention over time; x: (b f n c)."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_temp = (nn.LayerNorm(dim) for _ in range(4))
        self.attn1 = UNetAttention(f"{name}.attn1", "cross_frame", dim, dim, config)
        self.attn2 = UNetAttention(f"{name}.attn2", "text", dim, config.text_dim, config)
        self.ff = FeedForward(dim)
        self.attn_temp = UNetAttention(f"{name}.attn_temp", "temporal", dim, dim, config)

    def forward(self, x: Tensor, step: Step, space: Rotary | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y, step.plan, step.inject, space)
        text = rearrange(step.text, "b l c -> b 1 l c")
        x = x + self.attn2(self.norm2(x), text, seen_by_all(x.shape[1]), step.inject)
        x = x + self.ff(self.norm3(x))
        return x + self.over_time(self.norm_temp(x), step)

    def over_time(self, x: Tensor, step: Step) -> Tensor:
        """A pixel's frames are one group of keys, or one each where a plan cuts them: (b f n c)."""
        form, plan = (
            ("(b n) 1 f c", seen_by_all(1)) if step.time_plan is None else ("(b n) f 1 c", step.time_plan)
        )
        y, rotary = rearrange(x, f"b f n c -> {form}"), None
        if step.times is not None:
            width, apart = x.shape[-1] // self.attn_temp.heads, step.time_plan is not None
            rotary = rotary_time(step.times, width, x.device, x.dtype, apart=apart)
        return rearrange(self.attn_temp(y, y, plan, step.inject, rotary), f"{form} -> b f n c", b=x.shape[0])


class VideoTransformer(nn.Module):
    """A transformer block between two projections, with a residual around: (b f c h w)."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__()
        projection = nn.Linear if config.linear_projection else PointwiseConv
        self.norm = nn.GroupNorm(config.norm_groups, dim, eps=1e-6)
        self.proj_in = projection(dim, dim)
        self.heads = config.heads
        block = TransformerBlock(f"{name}.transformer_blocks.0", dim, config)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = projection(dim, dim)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        b, _, _, h, w = x.shape
        y = self.norm(rearrange(x, "b f c h w -> (b f) c h w"))
        y = self.proj_in(rearrange(y, "(b f) c h w -> b f (h w) c", b=b))
        space = step.times and rotary_3d(step.times, h, w, y.shape[-1] // self.heads, x.device, x.dtype)
        for block in self.transformer_blocks:
            y = block(y, step, space)
        return x + rearrange(self.proj_out(y), "b f (h w) c -> b f c h w", h=h)


# ---- levels ------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """Residual blocks, each followed by a transformer where the level has attention.

    ``dims`` are the widths that enter the residual blocks; all leave `dim_out`.
    """

    def __init__(self, name: str, dims: list[int], dim_out: int, config: UNetConfig, attentions: int) -> None:
        super().__init__()
        time_dim = 4 * config.channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim_out, time_dim, config.norm_groups) for dim in dims)
        self.attentions = nn.ModuleList(
            VideoTransformer(f"{name}.attentions.{j}", dim_out, config) for j in range(attentions)
        )
        self.checkpointing = config.checkpointing

    def layer(self, j: int, x: Tensor, step: Step) -> Tensor:
        """Residual block j and its transformer, if there is one."""
        for module in (*self.resnets[j : j + 1], *self.attentions[j : j + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(module, x, step, use_reentrant=False)
            else:
                x = module(x, step)
        return x


class DownLevel(Level):
    """A level on the way down; returns what it leaves behind for the way up, the last being its output."""

    def __init__(
        self, name: str, dim: int, dim_out: int, config: UNetConfig, *, attends: bool, halves: bool
    ) -> None:
        layers = config.layers_per_block
        super().__init__(name, [dim] + [dim_out] * (layers - 1), dim_out, config, layers if attends else 0)
        self.downsamplers = nn.ModuleList([Resample(dim_out, stride=2)] if halves else [])

    def forward(self, x: Tensor, step: Step) -> list[Tensor]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.layer(j, x, step)
            skips.append(x)
        skips.extend(half(x) for half in self.downsamplers)
        return skips


class MidLevel(Level):
    """Residual block, transformer, residual block at the lowest resolution."""

    def __init__(self, name: str, dim: int, config: UNetConfig) -> None:
        super().__init__(name, [dim, dim], dim, config, attentions=1)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.layer(1, self.layer(0, x, step), step)


class UpLevel(Level):
    """A level on the way up; takes its skips from their end, and scales to the next level's size.

    ``skips`` are their widths, in the order in which they are taken. ``forward`` leaves its arguments as they are:
    ZeRO-3 hands a module copies of the lists that it is called with.
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

    def forward(self, x: Tensor, skips: list[Tensor], size: tuple[int, int], step: Step) -> Tensor:
        for j, skip in enumerate(reversed(skips)):
            x = self.layer(j, torch.cat([x, skip], dim=2), step)  # b f c h w
        for double in self.upsamplers:
            x = double(x, size=size)
        return x


def build_levels(
    prefix: str, widths: tuple[int, ...], attention: tuple[bool, ...], config: UNetConfig
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """The way down and the way up of a U-Net whose levels have these widths, from full resolution down."""
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


def go_down(levels: nn.ModuleList, x: Tensor, step: Step) -> list[Tensor]:
    """x (b f c h w) and every level's skips, at falling resolution; the last is where the way up starts."""
    skips = [x]
    for level in levels:
        skips += level(skips[-1], step)
    return skips


def go_up(levels: nn.ModuleList, x: Tensor, skips: list[Tensor], step: Step) -> Tensor:
    """Back to full resolution, using the `skips` from their end."""
    for level in levels:
        assert isinstance(level, UpLevel)
        rest = len(skips) - len(level.resnets)
        height, width = skips[max(rest - 1, 0)].shape[-2:]  # of the next level
        x = level(x, skips[rest:], (height, width), step)
        skips = skips[:rest]
    return x
