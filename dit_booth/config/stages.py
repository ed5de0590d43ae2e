"""The stages of a run, and what each trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.errors import check_ranges

StageName = Literal["images", "base", "coarse", "fine", "joint", "subject"]
STAGES: tuple[StageName, ...] = ("images", "base", "coarse", "fine", "joint", "subject")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    steps: int = 200
    """Optimizer steps; 0: this stage's strategies take part as `weights` and `strategy_weights` have them."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    strategies: tuple[str, ...] = ()
    """Active strategies; empty: those that this stage or an earlier one trains."""
    train: tuple[str, ...] = ()
    """Globs over parameter names to train; empty: what the strategies declare, or the backbone (images, base)."""
    finetune_coarse: bool = False
    """Also train what the coarse stage trains (VideoBooth's released fine stage does)."""
    drop: float = 0.0
    """Share of samples that lose text and reference together, for guidance (VideoBooth's fine stage: 0.1)."""
    drop_image: float = 0.0
    """Share of further samples that lose the reference only, for separate guidance (InstructPix2Pix: 0.05 each)."""
    drop_text: float = 0.0
    """Share of further samples that lose the text only."""
    frames: int | tuple[int, ...] = 0
    """Train on this many consecutive frames of a video at a random offset: more subjects per second; 0: all frames.
    Several numbers, such as 4 8 16: each step draws one of them for all its videos."""
    foreground: bool = False
    """Only the subject's positions count in the loss, by the data's masks (ELITE's local stage)."""
    single_frames: bool = False
    """Train on every frame as a video of its own: cheap pretraining on images."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "",
            **dict.fromkeys(("steps", "warmup"), "[0, 1000000000]"),
            lr="(0, 1000]",
            **dict.fromkeys(("drop", "drop_image", "drop_text"), "[0, 1]"),
            frames="[0, 10000]",
        )
        if not self.lengths or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(
                f"frames is {self.frames}; give one number, or several different ones such as 4 8 16"
            )
        if self.drop + self.drop_image + self.drop_text > 1:
            raise ValueError(
                f"drop {self.drop} + drop_image {self.drop_image} + drop_text {self.drop_text} is more than 1;"
                " lower one of them"
            )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the numbers of frames that a step may have; 0: all."""
        return self.frames if isinstance(self.frames, tuple) else (self.frames,)

    def frames_of(self, video: int) -> int:
        """Return the number of frames that the stage trains on, the largest one, of a video of `video` frames."""
        return max(min(length or video, video) for length in self.lengths)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    images: StageConfig = StageConfig(single_frames=True)
    """Pretraining of the backbone on single frames, text only: far cheaper than on videos."""
    base: StageConfig = StageConfig()
    """Pretraining of the backbone on videos, text only."""
    coarse: StageConfig = StageConfig()
    """VideoBooth's first stage."""
    fine: StageConfig = StageConfig(drop=0.1)
    """VideoBooth's second stage."""
    joint: StageConfig = StageConfig(drop=0.1)
    """Everything at once (the paper's `unified`)."""
    subject: StageConfig = StageConfig()
    """Optimization for the one subject of the section `subject` (Textual Inversion, DreamBooth, Tune-A-Video)."""
