"""Options of the video U-Net, validated where they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.attention import FramePlan
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    in_channels: int = 4
    """Channels of the latents that enter."""
    out_channels: int = 4
    """Channels of the prediction."""
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Width of each level, from full resolution down."""
    layers_per_block: int = 2
    """Residual blocks of a level of the down path; one more on the up path."""
    heads: int = 8
    """Heads of every attention (attention_head_dim in Stable Diffusion 1.x's configuration)."""
    norm_groups: int = 32
    """Groups of every group norm."""
    text_dim: int = 768
    """Width of the text tokens."""
    down_attention: tuple[bool, ...] = (True, True, True, False)
    """Levels with transformer blocks; the up path mirrors them."""
    plan: str = "first+previous"
    """Frames that a frame reads: a sum of self, first, previous, window(k), keyframes(m), sink(s), chunk(k), past,
    all."""
    temporal_plan: str = "all"
    """Frames that a place reads in temporal attention, written as plan; self: an image model, whose frames stand alone
    but for plan and the group norms' statistics (Text2Video-Zero)."""
    positions: Literal["none", "rotary"] = "none"
    """Positions in cross-frame and temporal attention: none (Stable Diffusion, VideoBooth), or rotary ones of frame,
    row and column (temporal attention: of the frame alone), as in the DiT (RoFormer, 2104.09864)."""
    linear_projection: bool = False
    """Linear layers, not 1x1 convolutions, around the transformers (use_linear_projection; SD 2.x)."""
    attention: str = "auto"
    """Attention kernel."""
    watermark: bool = False
    """The branch of VideoBooth's released U-Net (watermark_remove_module.pt) that takes the videos' watermark away."""
    checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third more time."""

    def __post_init__(self) -> None:
        widths = ("in_channels", "out_channels", "channels", "heads", "norm_groups", "text_dim")
        check_ranges(self, "unet", layers_per_block="[1, 100]", **dict.fromkeys(widths, "[1, 65536]"))
        if not self.channels:
            raise ValueError("unet.channels is empty; give one width per level")
        if len(self.down_attention) != len(self.channels):
            raise ValueError(
                f"unet.down_attention has {len(self.down_attention)} flags for the {len(self.channels)}"
                f" levels of unet.channels {self.channels}; give one flag per level"
            )
        for field, divisor in (("norm_groups", self.norm_groups), ("heads", self.heads)):
            for width in self.channels:
                if width < 1 or width % divisor:
                    raise ValueError(
                        f"unet.channels {self.channels}: {width} is not a multiple of unet.{field} {divisor};"
                        f" use multiples of it, or another unet.{field}"
                    )
        attend = [w for w, attends in zip(self.channels, self.down_attention, strict=True) if attends]
        for width in (w // self.heads for w in (*attend, self.channels[-1])):
            if self.positions == "rotary" and (width % 2 or width < 6):
                raise ValueError(
                    f"unet.positions is rotary, but unet.channels {self.channels} and unet.heads {self.heads} make"
                    f" heads of width {width}; use an even one of 6 or more, or unet.positions none"
                )
        if self.watermark and len(self.channels) < 2:
            raise ValueError(
                f"unet.watermark needs two widths, unet.channels is {self.channels}; set it to false"
            )
        if self.channels[0] % 2:
            raise ValueError(
                f"unet.channels[0] is {self.channels[0]}; the timestep embedding needs an even one"
            )
        FramePlan(self.plan)
        FramePlan(self.temporal_plan)
