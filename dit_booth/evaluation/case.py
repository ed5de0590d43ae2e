"""A video to score, and what it was to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.data.example import IdentityDict
from dit_booth.evaluation.check import check_pictures

Control = Literal["", "truth", "shuffled", "none"]
"""A floor or ceiling that is scored like a method: the real video, another image prompt, or no image prompt."""
Values = float | NDArray[np.float64]
"""A metric of one video: one value for each frame (NaN where a frame has none), or one for the whole video."""
Scorer = Callable[["Case"], Mapping[str, Values]]
"""Computes metrics of one video, by name (`catalogue`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A video with its prompts and, where known, its ground truth; pictures are floats in [-1, 1].

    Attributes:
        video: `f 3 h w`.
        image: `3 s s`, the image prompt that the video is compared with, the subject on white.
        caption: the text prompt.
        subject: the words of the caption that the image stands for; may be empty.
        prompt: name of the prompt; differences are paired by it.
        truth: `f 3 h w`, the real video of the prompt.
        identity: the toy world's parameters of the subject (`toyworld.Identity`).
        noise_seed: seed of the sampling noise.
        control: empty for a method's own video.
        given: `3 s s`, the image prompt that the video was made from, if that is not `image`.
    """

    video: Tensor
    image: Tensor
    caption: str
    subject: str = ""
    prompt: str = ""
    truth: Tensor | None = None
    identity: IdentityDict | None = None
    noise_seed: int = 0
    control: Control = ""
    given: Tensor | None = None

    def as_truth(self) -> Case:
        """Return the real video as a case of its own: the ceiling, scored like a method."""
        assert self.truth is not None
        return replace(self, video=self.truth, control="truth", noise_seed=0, given=None)

    def __post_init__(self) -> None:
        check_pictures("video", self.video, axes="f 3 h w")
        check_pictures("image", self.image, axes="3 s s")
        if self.truth is not None:
            check_pictures("truth", self.truth, axes="f 3 h w")
            if self.truth.shape != self.video.shape:
                raise ValueError(
                    f"the video of prompt {self.prompt!r} has shape {tuple(self.video.shape)} and its real video"
                    f" {tuple(self.truth.shape)}; give both the same frames and size"
                )
