"""Shapes of training videos (buckets): each video has the one that fits it best, and each batch is of one shape.

Aspect-ratio bucketing is NovelAI's (2022); with numbers of frames, as Open-Sora (arXiv 2412.20404, section 3) trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """Frames, height and width of a video, in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"

    def needs(self, stride: int) -> int:
        """Return the frames that a file must have for it, every `stride`-th of which is read."""
        return (self.frames - 1) * stride + 1


def parse_shape(text: str, frames: int) -> Shape:
    """Read HEIGHTxWIDTH, of `frames` frames, or HEIGHTxWIDTHxFRAMES. ValueError: it is something else."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", text)
    if found is None:
        raise ValueError(
            f"data.buckets has {text!r}; write HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, such as 192x320x16"
        )
    height, width, count = found.groups()
    return Shape(int(count) if count else frames, int(height), int(width))


def choose_shape(
    shapes: Sequence[Shape], *, frames: int, height: int, width: int, stride: int
) -> Shape | None:
    """Return the shape for a video: of those that it is long enough for, that of the nearest aspect ratio.

    Of equally near ones, the one with the most frames, then the most pixels. None: it is too short for all.
    """
    fitting = [shape for shape in shapes if shape.needs(stride) <= frames]

    def preference(shape: Shape) -> tuple[float, int, int]:
        ratio = abs(math.log(shape.width * height / (shape.height * width)))
        return round(ratio, 9), -shape.frames, -shape.height * shape.width

    return min(fitting, key=preference, default=None)
