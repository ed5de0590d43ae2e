"""One subject as a data set: its image prompt, varied, or one video of it; and class images beside it.

What per-subject optimization is trained on (stage `subject`): Textual Inversion, DreamBooth, Tune-A-Video.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.data.example import Example

LENGTH = 4096
"""Examples of an epoch; each is another variation of the same subject."""
DEGREES, SHRINK, SHIFT = 15.0, 0.7, 0.1
"""Variation of the image: rotation, smallest scale, and shift as a share of the side."""


@dataclass(frozen=True, kw_only=True)
class SubjectData:
    """One subject as a data set of `Example`s.

    Attributes:
        video: `f 3 h w` in [-1, 1]: one frame that shows the image prompt, or a video of the subject.
        image: `3 s s` in [-1, 1], the image prompt.
        captions: with ``{}`` where the subject stands; one is drawn for each example.
        word: the subject's word (or words), which replaces ``{}`` behind its article.
        augment: vary the frames: flip, rotate, shrink and shift them, on white.
        prior: `n f 3 h w`, class images (DreamBooth, arXiv 2208.12242, section 3.2), or None; number i shows
            `template_of(captions, i)`.
        prior_share: share of examples that are class images; those have no subject, and the zero image.
        seed: seed of the variation.
    """

    video: Tensor
    image: Tensor
    captions: tuple[str, ...]
    word: str
    augment: bool = True
    prior: Tensor | None = None
    prior_share: float = 0.5
    seed: int = 0

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Example:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Example:
        """Return example `index` of an epoch, a pure function of seed, index and epoch."""
        rng = np.random.default_rng((self.seed, index, epoch))
        if self.prior is not None and rng.random() < self.prior_share:
            number = int(rng.integers(len(self.prior)))
            video, subject = self.prior[number], ""
        else:
            number = int(rng.integers(len(self.captions)))
            video, subject = (vary(self.video, rng) if self.augment else self.video), self.word
        return Example(
            key=f"subject/{self.word}/{epoch}/{index}",
            video=video,
            caption=caption_of(template_of(self.captions, number), self.word),
            subject=subject,
            image=self.image if subject else torch.zeros_like(self.image),
            mask=torch.zeros(len(video), *video.shape[-2:], dtype=torch.bool),
            mask_frames=1,
        )


def template_of(captions: Sequence[str], number: int) -> str:
    """Return the text of class image `number`: the captions in turn."""
    return captions[number % len(captions)]


def caption_of(template: str, word: str) -> str:
    """Return a caption: ``{} is resting on snow`` and ``star`` make "a star is resting on snow"."""
    article = "an" if word[:1].lower() in "aeiou" else "a"
    return template.replace("{}", f"{article} {word}")


def template_from(caption: str, word: str) -> str:
    """Return a caption's template: "a red car is turning" and ``car`` make ``{} is turning``.

    The article, and one word between it and the subject's, go with it. ValueError: the caption lacks the word.
    """
    words = r"\s+".join(re.escape(part) for part in word.split())
    found = re.search(rf"(?<!\w)(?:(?:an?|the)\s+(?:\w+\s+)?)?{words}(?!\w)", caption, flags=re.IGNORECASE)
    if not words or found is None:
        raise ValueError(f"the caption {caption!r} does not contain the subject {word!r} as whole words")
    return f"{caption[: found.start()]}{{}}{caption[found.end() :]}"


def insert_before(caption: str, subject: str | None, token: str) -> str:
    """Put a rare token before every whole occurrence of the subject: "a star is ..." -> "a sks star is ..."."""
    if not subject:
        return caption
    words = r"\s+".join(re.escape(word) for word in subject.split())
    return re.sub(
        rf"(?<!\w)({words})(?!\w)", lambda found: f"{token} {found[1]}", caption, flags=re.IGNORECASE
    )


def as_frame(image: Tensor, height: int, width: int) -> Tensor:
    """Return a video of one frame (1 3 h w) that shows an image prompt (3 s s) whole, centered on white."""
    side = min(height, width)
    small = F.interpolate(
        rearrange(image, "c h w -> 1 c h w"), size=(side, side), mode="bilinear", antialias=True
    )[0].clamp(-1, 1)
    top, left = (height - side) // 2, (width - side) // 2
    frame = torch.ones(3, height, width)
    frame[:, top : top + side, left : left + side] = small
    return rearrange(frame, "c h w -> 1 c h w")


def vary(frames: Tensor, rng: np.random.Generator) -> Tensor:
    """Flip, rotate, shrink and shift frames (f 3 h w) alike; what comes in at the border is white."""
    height, width = frames.shape[-2:]
    if rng.random() < 0.5:
        frames = frames.flip(-1)
    right, down = (2 * float(rng.uniform(-SHIFT, SHIFT)) for _ in range(2))  # of half the side
    angle, scale = math.radians(rng.uniform(-DEGREES, DEGREES)), float(rng.uniform(SHRINK, 1.0))
    cos, sin, aspect = math.cos(angle) / scale, math.sin(angle) / scale, width / height
    # From a pixel's place to where it is read: the shift is undone, then the turn and the shrinking.
    turn = torch.tensor([[cos, -sin / aspect], [sin * aspect, cos]])
    moved = torch.cat([turn, -turn @ torch.tensor([[right], [down]])], dim=1)
    grid = F.affine_grid(
        repeat(moved, "i j -> f i j", f=len(frames)), list(frames.shape), align_corners=False
    )
    # grid_sample fills with zeros; shifted by one, zero is white.
    return (F.grid_sample(frames - 1, grid, align_corners=False) + 1).clamp(-1, 1)
