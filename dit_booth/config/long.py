"""Options of sampling videos with more frames than those of the training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dit_booth.errors import check_ranges

LongKind = Literal["none", "chunks", "diffusion_forcing", "freenoise", "lvdm"]


@dataclass(frozen=True, kw_only=True)
class LongConfig:
    """Options of sampling long videos (docs/long.md); its frames, but those of riflex, are latent ones."""

    kind: LongKind = "none"
    """none: all frames at once; chunks: each continues from the clean last frames before it; diffusion_forcing: a queue
    of frames at rising noise levels (FIFO, arXiv 2405.11473); freenoise: all frames at once, with shuffled noise and
    temporal attention in windows (arXiv 2310.15169); lvdm: clips predicted from known frames (section clips)."""
    window: int = 0
    """Frames that one pass sees, as many as a training video has (freenoise: those of a window); 0: the
    longest crop of the run's stages, or data.frames."""
    prefix: int = 2
    """chunks: clean past frames that a chunk continues from; diffusion_forcing: frames of the window that come before
    those which a pass denoises (FIFO: 0; its lookahead: half a window)."""
    cache: bool = True
    """chunks: keep the prefix's keys and values over the sampling steps, where the plans allow it."""
    stride: int = 4
    """freenoise: distance of the windows, and frames that are shuffled together."""
    interpolated: int = 0
    """lvdm: frames of a clip that interpolates between two predicted ones, its ends included; 0: prediction alone."""
    riflex: int = 0
    """Frames of a training video, after which longer ones would repeat: one rotary frequency of time is lowered
    (RIFLEx, arXiv 2502.15894). 0: none is."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        if self.kind not in get_args(LongKind):
            raise ValueError(
                f"sample.long.kind is {self.kind!r}; choose one of {', '.join(get_args(LongKind))}"
            )
        counts = dict.fromkeys(("window", "prefix", "interpolated", "riflex"), "[0, 10000]")
        check_ranges(self, "sample.long", **counts, stride="[1, 10000]")
        if self.kind == "freenoise" and 0 < self.window < self.stride:
            raise ValueError(
                f"sample.long.stride is {self.stride}, more than sample.long.window {self.window}; frames would lie in"
                " no window: make it smaller"
            )
        if self.interpolated in (1, 2):
            raise ValueError(
                f"sample.long.interpolated is {self.interpolated}; give at least 3, two ends and a frame between them,"
                " or 0"
            )

    def window_of(self, trained: int) -> int:
        """Return the frames of a window for a training of `trained` frames. ValueError: the prefix leaves no others."""
        window = self.window or trained
        if self.kind in ("chunks", "diffusion_forcing") and self.prefix >= window:
            raise ValueError(
                f"sample.long.prefix is {self.prefix}, but a pass sees {window} frames (sample.long.window, else"
                " those of the training); give fewer, so that it has new ones"
            )
        return window
