"""Options of the video DiT, validated where they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dit_booth.attention import FramePlan
from dit_booth.errors import check_ranges


class Size(NamedTuple):
    depth: int
    hidden: int
    heads: int


SIZES = {  # S to XL as in DiT, table 1
    "nano": Size(5, 128, 4),
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12),
    "L": Size(24, 1024, 16),
    "XL": Size(28, 1152, 16),
}
PLAN_OF = {"joint": "all", "image": "self"}  # layouts without temporal attention leave the frames one plan


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    size: Literal["nano", "S", "B", "L", "XL"] = "nano"
    """Depth, width and heads; S to XL as in DiT (table 1)."""
    depth: int = 0
    """Blocks; 0: the size's."""
    hidden: int = 0
    """Width; 0: the size's."""
    heads: int = 0
    """Heads of every attention; 0: the size's."""
    patch: Literal[1, 2, 4, 8] = 2
    """Side of a token in latent pixels."""
    layout: Literal["factorised", "interleaved", "joint", "image"] = "factorised"
    """factorised: cross-frame, then temporal attention in every block; interleaved: blocks alternate (Latte,
    2401.03048); joint: one attention over space and time (plan all); image: every frame by itself (plan self; DiT)."""
    plan: str = "first+previous"
    """Frames that a frame reads: a sum of self, first, previous, window(k), keyframes(m), sink(s), chunk(k), past,
    all."""
    temporal_plan: str = "all"
    """Frames that a place reads in temporal attention, written as plan; self: an image model, whose frames stand alone
    but for plan (Text2Video-Zero)."""
    conditioning: Literal["adaln_zero", "adaln", "in_context", "cross_attention", "class_label"] = (
        "adaln_zero"
    )
    """Text conditioning (DiT section 3.2): pooled, in the modulation (adaln: without gates); as tokens that take part
    in the cross-frame attention (in_context) or are read by one of their own (cross_attention), the timestep alone
    modulating; class_label: a label in the text's place, as DiT has it."""
    classes: int = 1000
    """class_label: number of classes; the label after the last one is the null class."""
    head_text: bool = True
    """Modulate the head by the blocks' conditioning vector; false: by the timestep alone (Latte with text)."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """Row, column and frame: fixed sin-cos, added once (DiT, MAE), or rotary in three axes (RoFormer, 2104.09864)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of every head: stable in low precision (ViT-22B, 2302.05442; SD3, 2403.03206)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Unit of the MLP; swiglu (Shazeer, 2002.05202) has three layers of two thirds the width."""
    conv: bool = False
    """Before its MLP, every block adds to each token a depth-wise 3 x 3 convolution of its frame's tokens. It starts at
    zero (the position encoding generator of CPVT, 2102.10882)."""
    init: Literal["dit", "depth_scaled"] = "dit"
    """depth_scaled: layers that add to the residual stream start 1 / sqrt(their count) smaller (GPT-2, 2.3)."""
    attention: str = "auto"
    """Attention kernel."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = 1
    """With checkpointing: recompute every k-th block only."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"dit.size is {self.size!r}; use one of {', '.join(SIZES)}")
        check_ranges(
            self,
            "dit",
            depth="[0, 1000]",
            hidden="[0, 65536]",
            heads="[0, 1024]",
            patch="[1, 8]",
            classes="[0, 1000000]",
            checkpoint_every="[1, 1000]",
        )
        FramePlan(self.plan)
        FramePlan(self.temporal_plan)
        plan = PLAN_OF.get(self.layout, self.plan)
        if self.plan != plan:
            raise ValueError(
                f"dit.layout {self.layout!r} needs dit.plan {plan!r}, but it is {self.plan!r}: there is no temporal"
                f" attention; set --dit.plan {plan}, or another layout"
            )
        if self.layout in PLAN_OF and self.temporal_plan != "all":
            raise ValueError(
                f"dit.temporal_plan is {self.temporal_plan!r}, but dit.layout {self.layout!r} has no temporal"
                " attention; leave it at all"
            )
        _, hidden, heads = self.shape
        if hidden % heads or hidden % 4:
            raise ValueError(
                f"dit.hidden is {hidden} with dit.heads {heads}; use a multiple of the heads, and of 4"
            )
        width = hidden // heads
        if self.positions == "rotary" and (width % 2 or width < 6):
            raise ValueError(
                f"dit.positions is rotary, but heads of dit.hidden {hidden} / dit.heads {heads} = {width} have no pairs"
                " for three axes; use an even width of 6 or more, or sincos"
            )

    @property
    def shape(self) -> Size:
        """Depth, width and heads; those that are not set come from the size."""
        size = SIZES[self.size]
        return Size(self.depth or size.depth, self.hidden or size.hidden, self.heads or size.heads)

    def parts(self, index: int) -> tuple[str, ...]:
        """Return the modulated sub-layers of block `index`, in order."""
        if self.layout == "factorised":
            return ("attn1", "attn_temp", "mlp")
        if self.layout == "interleaved" and index % 2:
            return ("attn_temp", "mlp")
        return ("attn1", "mlp")
