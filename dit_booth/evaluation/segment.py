"""Find the subject of a picture whose background is smooth, without ground truth.

The background is a low-order polynomial surface in CIELAB, fitted to the pixels along the border; the subject
is the region that differs from it. So the toy world's generated videos, and image prompts on white, can be compared by
the subject's pixels alone: whole-frame metrics also count the background.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import deltaE_ciede2000, rgb2lab
from torch import Tensor

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.check import check_pictures

Array = NDArray[np.float64]
Rgb = tuple[float, float, float]

delta_e: Callable[[Array, Array], Array] = deltaE_ciede2000
"""CIEDE2000 color difference of CIELAB arrays `... 3`; skimage's function has no types."""

WHITE: Rgb = (1.0, 1.0, 1.0)
THRESHOLD = 13.0  # Delta E 2000: clearly another colour; the toy world's ripples stay below 4
SPECK = 0.01  # share of the frame's pixels below which a connected component is noise
_BORDER = 1 / 16  # width of the border, as a share of the shorter side
_NEAR = 10.0  # Euclidean distance in CIELAB within which border pixels count as one colour


def subject_mask(frame: Tensor, *, background: Rgb | None = None) -> Tensor:
    """Segment the subject of one frame: the region that differs from the smooth background.

    The fit starts from the commonest colour of the border, so a subject may touch the border, but it must
    not cover most of it: where it may (an image prompt is cropped to its subject), name the `background`.

    Args:
        frame: `3 h w` in [-1, 1].
        background: the background's colour, RGB in [0, 1], if it is known: `WHITE` for an image prompt.

    Returns:
        `h w` bool on the CPU; all false if nothing differs by `THRESHOLD` Delta E 2000 over at least
        `SPECK` of the frame.

    Raises:
        ValueError: the frame has the wrong shape or is not finite.
    """
    check_pictures("frame", frame, axes="3 h w")
    lab = to_lab(rearrange(frame, "c h w -> h w c"))
    if background is not None:
        ground = np.broadcast_to(rgb2lab(np.asarray(background, np.float64)), lab.shape)
        return torch.from_numpy(_subject(lab, ground))
    border = _border(lab.shape[0], lab.shape[1])
    ground = _fit(lab, _commonest(lab, border), degree=1)
    ground = _fit(lab, border & (_distance(lab, ground) < _NEAR), degree=2)
    # Background pixels inside the frame constrain the surface away from the border.
    rest = ~ndimage.binary_dilation(_subject(lab, ground), iterations=1)
    if rest.mean() > SPECK:
        ground = _fit(lab, rest & (_distance(lab, ground) < _NEAR), degree=3)
    return torch.from_numpy(_subject(lab, ground))


def subject_masks(video: Tensor) -> Tensor:
    """Segment the subject of every frame of a video `f 3 h w` in [-1, 1]: `f h w` bool on the CPU."""
    return torch.stack([subject_mask(frame) for frame in video])


@lru_cache(maxsize=8)
def case_masks(case: Case) -> Tensor:
    """Return `subject_masks` of a case's video; the metrics of one case share them."""
    return subject_masks(case.video)


def background(frame: Array, mask: NDArray[np.bool_]) -> Array:
    """Fit the smooth background of a frame `h w 3` outside the subject's mask `h w`, evaluated everywhere."""
    rest = ~ndimage.binary_dilation(mask, iterations=2)
    if rest.mean() < SPECK:
        rest = ~mask if not mask.all() else mask
    return np.asarray(_fit(frame, rest, degree=3))


def to_lab(values: Tensor) -> Array:
    """Return CIELAB (D65) of colours in [-1, 1] along the last axis; values beyond are clamped."""
    return np.asarray(rgb2lab((values.detach().to("cpu", torch.float64).clamp(-1, 1).numpy() + 1) / 2))


def _subject(lab: Array, ground: Array) -> NDArray[np.bool_]:
    """Threshold in Delta E 2000; then halve the mixed pixels of the outline, and drop specks."""
    difference = np.asarray(delta_e(lab, ground))
    mask = difference > THRESHOLD
    # A pixel of the outline is a mixture, and is the subject's if it is nearer to it than to the background.
    outline = mask & ~ndimage.binary_erosion(mask, border_value=1)
    mask &= ~(outline & (difference < ndimage.maximum_filter(difference, size=3) / 2))
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= SPECK * mask.size
    keep[0] = False
    kept: NDArray[np.bool_] = keep[labels]
    return kept


def _border(height: int, width: int) -> NDArray[np.bool_]:
    thickness = max(1, round(min(height, width) * _BORDER))
    border = np.ones((height, width), dtype=bool)
    border[thickness:-thickness, thickness:-thickness] = False
    return border


def _commonest(lab: Array, border: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the border pixels around the border's commonest colour (the one with the most others near it)."""
    colours = lab[border]
    candidates = colours[:: max(1, len(colours) // 256)]
    lengths = (np.square(each).sum(axis=1) for each in (candidates, colours))
    apart = np.add.outer(*lengths) - 2 * candidates @ colours.T  # squared
    centre = candidates[int((apart < _NEAR**2).sum(axis=1).argmax())]
    near: NDArray[np.bool_] = _distance(lab, centre) < _NEAR
    return border & near


def _fit(lab: Array, chosen: NDArray[np.bool_], *, degree: int) -> Array:
    """Fit a least-squares polynomial surface to the chosen pixels, evaluated everywhere: `h w c`."""
    basis = _polynomials(*chosen.shape, degree)
    # A slight ridge keeps the surface flat if too few pixels are chosen.
    ridge = 1e-3 * chosen.sum() * np.eye(basis.shape[-1])
    ridge[0, 0] = 0
    known = basis[chosen]
    weights = np.linalg.lstsq(known.T @ known + ridge, known.T @ lab[chosen], rcond=None)[0]
    return np.asarray(basis @ weights)


@cache
def _polynomials(height: int, width: int, degree: int) -> Array:
    """Return the terms of a polynomial of two variables in [-1, 1] at every pixel: `h w terms`."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i)], axis=-1)


def _distance(lab: Array, ground: Array) -> Array:
    light, red, yellow = rearrange(lab - ground, "h w c -> c h w")
    return np.asarray(np.sqrt(light * light + red * red + yellow * yellow))
