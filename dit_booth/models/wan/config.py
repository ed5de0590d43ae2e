"""Options of Wan, validated where they are built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from dit_booth.attention import FramePlan
from dit_booth.errors import check_ranges


class Size(NamedTuple):
    depth: int
    hidden: int
    heads: int
    ffn: int


SIZES = {  # 1.3b and 14b as in the released configurations
    "nano": Size(5, 128, 4, 512),
    "1.3b": Size(30, 1536, 12, 8960),
    "14b": Size(40, 5120, 40, 13824),
}


@dataclass(frozen=True, kw_only=True)
class WanConfig:
    size: Literal["nano", "1.3b", "14b"] = "nano"
    """Depth, width, heads and width of the MLP; 1.3b and 14b as released."""
    depth: int = 0
    """Blocks; 0: the size's."""
    hidden: int = 0
    """Width; 0: the size's."""
    heads: int = 0
    """Heads of every attention; 0: the size's."""
    ffn: int = 0
    """Width of the MLP; 0: the size's."""
    patch: Literal[1, 2, 4, 8] = 2
    """Side of a token in latent pixels; a token never spans two latent frames."""
    plan: str = "all"
    """Frames that a frame reads: a sum of self, first, previous, window(k), keyframes(m), sink(s), chunk(k), past, all
    (as pretrained)."""
    cross_attn_norm: bool = True
    """Normalise the text attention's input (all released weights do)."""
    image_dim: int = 0
    """Width of the image states that the text attention also reads, by keys of their own (image to video: 1280);
    0: none (text to video)."""
    condition_channels: int = 0
    """Input channels behind the latents' own (image to video: 20, a mask of 4 and a latent video of 16), which strategy
    image_to_video fills; else zeros."""
    image_encoder: str = ""
    """With image_dim: folder with image_encoder/ and image_processor/ (transformers), whose states of the image
    strategy image_to_video passes on. Empty: the pipeline's folder in `weights`."""
    reference_place: Literal["before", "first", "after"] = "before"
    """Rotary place of a reference's keys in time: before frame 0, that of frame 0, or after the last frame."""
    attention: str = "auto"
    """Attention kernel."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = 1
    """With checkpointing: recompute every k-th block only."""

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"wan.size is {self.size!r}; use one of {', '.join(SIZES)}")
        check_ranges(
            self,
            "wan",
            depth="[0, 1000]",
            hidden="[0, 65536]",
            heads="[0, 1024]",
            ffn="[0, 1000000]",
            patch="[1, 8]",
            image_dim="[0, 65536]",
            condition_channels="[0, 65536]",
            checkpoint_every="[1, 1000]",
        )
        FramePlan(self.plan)
        width, rest = divmod(self.shape.hidden, self.shape.heads)
        if rest or width % 2 or width < 6:
            raise ValueError(
                f"wan.hidden is {self.shape.hidden} with wan.heads {self.shape.heads}; heads need an even width of 6 or"
                " more, with pairs for the three axes of rotary positions: change one of them"
            )

    @property
    def shape(self) -> Size:
        """Depth, width, heads and the MLP's width; those that are not set come from the size."""
        size = SIZES[self.size]
        own = Size(self.depth, self.hidden, self.heads, self.ffn)
        return Size(*(mine or default for mine, default in zip(own, size, strict=True)))
