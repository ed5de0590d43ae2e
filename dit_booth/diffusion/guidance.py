"""Classifier-free guidance (Ho & Salimans, 2022), by text and image together, or with one scale for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_booth.errors import check_ranges


class Branch(NamedTuple):
    """One prediction of a guided step: with or without the text, with or without the image."""

    text: bool
    image: bool


BOTH, IMAGE, NEITHER = Branch(True, True), Branch(False, True), Branch(False, False)


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Options of classifier-free guidance."""

    scale: float = 4.0
    """uncond + scale * (cond - uncond); 1 is no guidance. VideoBooth samples with 4."""
    image: float | None = None
    """Scale of the image alone, instead of `scale`: eps(0,0) + image (eps(0,I) - eps(0,0)) + text (eps(T,I) - eps(0,I))
    (InstructPix2Pix, arXiv 2211.09800, eq. 3). Train with stages.*.drop_text."""
    text: float | None = None
    """Scale of the text alone, with `image`'s; where only one of the two is given, the other is 1."""
    channels: int | None = None
    """Guide only the first `channels` channels; None: all. VideoBooth's released code guides 3 of 4."""
    negative: str = ""
    """Text of the branches without the prompt, such as Wan's list of faults; empty: the text encoder's null prompt."""
    unconditional: Literal["zero_image", "omit"] = "zero_image"
    """The unconditional branch's image: the zero image, as in training, or none at all (VideoBooth's released code)."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        scales = dict.fromkeys(("scale", "image", "text"), "[-1000, 1000]")
        check_ranges(self, "guidance", **scales, channels="[1, 4096]")
        if self.unconditional not in ("zero_image", "omit"):
            raise ValueError(f"unconditional={self.unconditional!r}: choose zero_image or omit")

    @property
    def scales(self) -> tuple[float, float]:
        """Scales of the image and of the text."""
        if self.image is None and self.text is None:
            return self.scale, self.scale
        return (1.0 if self.image is None else self.image), (1.0 if self.text is None else self.text)

    def branches(self) -> tuple[Branch, ...]:
        """Return the predictions that a step needs, the one with text and image first; unweighted ones are omitted."""
        image, text = self.scales
        return (BOTH, *[IMAGE] * (image != text), *[NEITHER] * (image != 1))

    def combine(self, predictions: Sequence[Tensor], axis: int = -3) -> Tensor:
        """Combine one prediction for each of `branches` (b ..., channels on `axis`) into the guided one."""
        image, text = self.scales
        named = dict(zip(self.branches(), predictions, strict=True))
        if len(named) == 1:
            return named[BOTH]
        if len(named) == 2:  # by both at once, or by the text alone
            return guide(named[BOTH], predictions[1], text, self.channels, axis)
        by_image = guide(named[IMAGE], named[NEITHER], image)
        guided = by_image + text * (named[BOTH] - named[IMAGE])
        return _only(self.channels, guided, named[BOTH], axis)


def guide(
    cond: Tensor, uncond: Tensor, scale: float, channels: slice | int | None = None, axis: int = -3
) -> Tensor:
    """uncond + scale (cond - uncond) (Ho & Salimans eq. 6, with scale = 1 + w).

    cond, uncond: (b f c h w), or any shape with the channels on `axis`. channels: the guided ones, an int n
    meaning the first n; the others keep the conditional prediction. Raises ValueError for unequal shapes.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)} must have equal shapes")
    return _only(channels, uncond + scale * (cond - uncond), cond, axis)


def _only(channels: slice | int | None, guided: Tensor, cond: Tensor, axis: int) -> Tensor:
    """The guided prediction in the chosen channels, the conditional one in the others."""
    if channels is None:
        return guided
    count = cond.shape[axis]
    if isinstance(channels, int) and not 1 <= channels <= count:
        raise ValueError(
            f"channels={channels}: the prediction has {count}; choose 1 to {count}, or none for all"
        )
    chosen = torch.zeros(count, dtype=torch.bool, device=cond.device)
    chosen[slice(channels) if isinstance(channels, int) else channels] = True
    shape = [1] * cond.ndim
    shape[axis] = count
    return torch.where(chosen.reshape(shape), guided, cond)
