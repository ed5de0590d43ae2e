"""The `subject` section of a run: the one subject that stage `subject` is optimized for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dit_booth.data.image_prompt import as_image_prompt, shows_subject
from dit_booth.data.readers.item import fit
from dit_booth.data.subject import SubjectData, as_frame
from dit_booth.data.video import probe, read_video
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    image: str = ""
    """Image prompt of the subject: an image file, or a folder with image.jpg and a mask."""
    mask: str = ""
    """Mask of the image's subject; without one, and without transparency, the whole image is taken."""
    video: str = ""
    """A video of the subject, for tune_on=video."""
    tune_on: Literal["image", "video"] = "image"
    """What the stage learns: the image prompt, or the first data.frames frames of the video (Tune-A-Video)."""
    word: str = ""
    """The subject's class in words, such as star; what prompts name it by."""
    token: str = ""
    """A rare token that stands before the subject's words in every prompt (DreamBooth), such as sks."""
    captions: tuple[str, ...] = ("a photo of {}",)
    """Texts to tune on; {} is the subject's words with their article."""
    prompts: tuple[str, ...] = ()
    """Texts to sample the subject for, with {}; empty: a run samples the prompts of its data, with their own images."""
    augment: bool = True
    """Flip, rotate, shrink and shift the image in training."""
    prior: int = 0
    """Class images that the base itself samples, for prior preservation (DreamBooth: 1000); 0: none."""
    prior_weight: float = 1.0
    """Weight of the class images' loss: they are this many times as frequent as the subject (DreamBooth: 1)."""

    def __post_init__(self) -> None:
        check_ranges(self, "subject", prior="[0, 1000000]", prior_weight="(0, 1000]")
        for name in ("captions", "prompts"):
            if wrong := [text for text in getattr(self, name) if text.count("{}") != 1]:
                raise ValueError(
                    f"subject.{name} has {wrong[0]!r}; write {{}} once, where the subject stands"
                )
        if self.video and self.tune_on == "image":
            raise ValueError(
                f"subject.video is {self.video!r}, and subject.tune_on is image; set it to video, or give no video"
            )
        if self.tune_on == "video" and self.prior:
            raise ValueError(
                f"subject.prior is {self.prior}, and subject.tune_on is video: class images are single frames; set"
                " subject.prior to 0"
            )
        if not self.captions:
            raise ValueError("subject.captions is empty; give at least one text with {}")

    def build(
        self, *, frames: int, size: tuple[int, int], side: int, seed: int, prior: Tensor | None
    ) -> SubjectData:
        """Read the subject's files. ValueError: none given, no word, or an image that shows nothing.

        size: height and width of the videos; side: of the image prompt. prior: class images (n f 3 h w in [-1, 1]),
        or None.
        """
        image, moving = self.read_image(side), self.tune_on == "video"
        return SubjectData(
            video=self.read_video(frames, size) if moving else as_frame(image, *size),
            image=image,
            captions=self.captions,
            word=self.word,
            augment=self.augment and not moving,
            prior=prior,
            prior_share=self.prior_weight / (1 + self.prior_weight),
            seed=seed,
        )

    def read_image(self, side: int) -> Tensor:
        """Read the image prompt (3 s s in [-1, 1]). ValueError: no image or word, or an image that shows nothing."""
        for name in ("image", "word"):
            if not getattr(self, name):
                raise ValueError(f"subject.{name} is empty; stage subject needs it")
        image = as_image_prompt(self.image, size=side, mask=self.mask or None)
        if not shows_subject(image[None]).all():
            raise ValueError(
                f"subject.image {self.image} is all white; give a picture that shows the subject"
            )
        return image

    def read_video(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Read the first frames of the video (f 3 h w in [-1, 1]), scaled and cropped about their middle if they are of
        another size. ValueError: it has fewer.
        """
        if not self.video:
            raise ValueError(
                f"subject.video is empty, and subject.tune_on is {self.tune_on}; give a video of the subject"
            )
        path = Path(self.video).expanduser()
        try:
            there = probe(path).frames
            pixels = read_video(path, frames=min(frames, there))
        except ValueError as error:
            raise ValueError(f"subject.video: {error}") from error
        if there < frames:
            raise ValueError(
                f"subject.video {path} has {there} frames and data.frames is {frames}; lower data.frames, or give a"
                " longer video"
            )
        _, height, width, _ = pixels.shape
        no_mask, whole = np.zeros((height, width), bool), (0, 0, width, height)
        return fit(torch.from_numpy(pixels), no_mask, box=whole, size=size)[0]
