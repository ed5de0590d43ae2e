"""Distance in colour between a video's subject and the image prompt: optimal transport between palettes.

In the toy world the exact colours are in the image prompt and never in the caption, so this distance is a
direct measure of whether the image was used. Units are Delta E 2000 (about 1 is a just noticeable difference,
CIE 142-2001); 0 is the same palette.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linprog
from torch import Tensor

from dit_booth.evaluation.case import Case, Values
from dit_booth.evaluation.check import check_pictures
from dit_booth.evaluation.long_scene import under_scene_light
from dit_booth.evaluation.segment import WHITE, case_masks, delta_e, subject_mask, subject_masks, to_lab

Array = NDArray[np.float64]

_SEED = 0
_RESTARTS = 4
_ITERATIONS = 20
_ENUMERATED = (
    3  # colours up to which the optimal transport is found among all basic solutions: 50 times as fast
)
_ROUNDING = 1e-9
_INTERIOR = 0.4  # drop the outline from a palette if at least this fraction of the subject remains


class Palette(NamedTuple):
    """Colours in CIELAB, `k 3`, heaviest first, and their weights, `k`, which sum to 1."""

    colours: Array
    weights: Array


@dataclass(frozen=True)
class PaletteScore:
    """A video's palette distance in Delta E 2000, and the share of frames in which a subject was found."""

    distance: float
    found: float


def palette(pixels: Tensor, k: int = 3) -> Palette:
    """Return the `k` main colours of pixels: seeded k-means in CIELAB, independent of the pixels' order.

    Args:
        pixels: `n 3`, RGB in [0, 1]; values beyond are clamped.
        k: number of colours; fewer are returned if the pixels have fewer.

    Raises:
        ValueError: there are no pixels, or `k` is below 1.
    """
    if pixels.ndim != 2 or pixels.shape[1] != 3 or pixels.numel() == 0:
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}; it must be (n 3), not empty")
    if k < 1:
        raise ValueError(f"k is {k}; a palette needs at least 1 colour")
    points, counts = np.unique(to_lab(pixels * 2 - 1), axis=0, return_counts=True)
    rng = np.random.default_rng(_SEED)
    centres, nearest = _k_means(points, counts, min(k, len(points)), rng)
    mass = np.bincount(nearest, weights=counts, minlength=len(centres))
    order = [i for i in np.argsort(-mass, kind="stable") if mass[i] > 0]
    return Palette(centres[order], mass[order] / mass.sum())


def palette_distance(a: Palette, b: Palette) -> float:
    """Compute the earth mover's distance between two palettes, in Delta E 2000.

    Minimises `sum_ij plan_ij deltaE(a_i, b_j)` over plans whose margins are the two weights (Rubner et al.,
    IJCV 2000), so two single colours are exactly their CIE2000 difference apart.
    """
    cost = delta_e(rearrange(a.colours, "i c -> i 1 c"), rearrange(b.colours, "j c -> 1 j c"))
    rows, columns = cost.shape
    margins = _margins(rows, columns)
    # One margin follows from the others: without it rounding cannot make the plan infeasible.
    wanted = np.concatenate([a.weights, b.weights])[:-1]
    if max(rows, columns) <= _ENUMERATED:
        plans = _bases(rows, columns) @ wanted
        costs = plans @ rearrange(cost, "i j -> (i j)")
        return max(0.0, float(costs[plans.min(axis=1) > -_ROUNDING].min()))
    plan = linprog(rearrange(cost, "i j -> (i j)"), A_eq=margins, b_eq=wanted, method="highs")
    assert plan.success, plan.message
    return max(0.0, float(plan.fun))


@under_scene_light
def palette_scores(case: Case) -> dict[str, Values]:
    """Score every frame: `palette` (Delta E 2000) and `subject_found` (0 or 1)."""
    found = case_masks(case)
    distances = palette_distances(case.video, case.image, found)
    return {"palette": distances, "subject_found": found.any((1, 2)).numpy().astype(np.float64)}


def palette_distances(video: Tensor, image: Tensor, masks: Tensor, k: int = 3) -> Array:
    """Compute each frame's distance between the subject's palette and the image prompt's, `f`.

    A frame without a subject counts with the palette of the whole frame: that is its background, which is far
    from any subject that can be seen on it. It is never left out, so a subject that vanishes scores worse.

    Args:
        video: `f 3 h w` in [-1, 1].
        image: `3 s s` in [-1, 1], the subject on white.
        masks: `f h w` bool, true on the subject.
        k: colours of a palette.
    """
    target = subject_palette(image, subject_mask(image, background=WHITE), k)
    return np.array(
        [
            palette_distance(subject_palette(frame, mask, k), target)
            for frame, mask in zip(video, masks, strict=True)
        ]
    )


def video_palette_distance(
    video: Tensor, image: Tensor, *, masks: Tensor | None = None, k: int = 3
) -> PaletteScore:
    """Compute the distance between the subject's palette in the frames and in the image prompt, mean over frames.

    See `palette_distances` for frames without a subject.

    Args:
        video: `f 3 h w` in [-1, 1].
        image: `3 s s` in [-1, 1], the subject on white.
        masks: `f h w` bool, true on the subject; None: `subject_mask` of every frame.
        k: colours of a palette.

    Raises:
        ValueError: a tensor has the wrong shape or is not finite.
    """
    check_pictures("video", video, axes="f 3 h w")
    check_pictures("image", image, axes="3 s s")
    frames, _, height, width = video.shape
    if masks is not None and (tuple(masks.shape) != (frames, height, width) or masks.dtype != torch.bool):
        raise ValueError(
            f"masks is {masks.dtype} of shape {tuple(masks.shape)}; "
            f"it must be torch.bool of the video's shape (f, h, w) = {(frames, height, width)}"
        )
    found = subject_masks(video) if masks is None else masks.cpu()
    distances = palette_distances(video, image, found, k)
    return PaletteScore(float(np.mean(distances)), int(found.any(2).any(1).sum()) / frames)


def subject_palette(frame: Tensor, mask: Tensor, k: int = 3) -> Palette:
    """Return the palette of a frame `3 h w` in [-1, 1] inside `mask` (`h w` bool); of all of it if that is empty.

    The outline mixes subject and background, so it is left out where enough of the subject remains.
    """
    inside = mask.cpu().numpy()
    interior = ndimage.binary_erosion(inside, structure=np.ones((3, 3)), border_value=1)
    if interior.sum() >= max(1, _INTERIOR * inside.sum()):
        inside = interior
    pixels = rearrange((frame.detach().cpu().clamp(-1, 1) + 1) / 2, "c h w -> h w c")
    return palette(pixels[torch.from_numpy(inside if inside.any() else ~inside)], k)


@cache
def _margins(rows: int, columns: int) -> Array:
    """Return the matrix that maps a transport plan to its margins but the last: `margin (i j)`."""
    outgoing = repeat(np.eye(rows), "r i -> r (i j)", j=columns)
    incoming = repeat(np.eye(columns), "r j -> r (i j)", i=rows)
    return np.concatenate([outgoing, incoming])[:-1]


@cache
def _bases(rows: int, columns: int) -> Array:
    """Return the matrix from margins to plan of every basis of the transport problem: `basis (i j) margin`.

    A linear programme has its optimum at a basic feasible solution; 3 x 3 cells have 81 of them.
    """
    margins = _margins(rows, columns)
    chosen = [list(cells) for cells in combinations(range(rows * columns), len(margins))]
    chosen = [cells for cells in chosen if np.linalg.matrix_rank(margins[:, cells]) == len(margins)]
    bases = np.zeros((len(chosen), rows * columns, len(margins)))
    for basis, cells in zip(bases, chosen, strict=True):
        basis[cells] = np.linalg.inv(margins[:, cells])
    return bases


def _k_means(
    points: Array, counts: NDArray[np.int64], k: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.int64]]:
    """Return the centres of the start with the least inertia, and the nearest centre of every point.

    All `_RESTARTS` starts, each as k-means++ does, run side by side.
    """
    centres = np.stack([_spread_centres(points, counts, k, rng) for _ in range(_RESTARTS)])
    for _ in range(_ITERATIONS):
        nearest = _squares(points, centres).argmin(axis=1)
        member = counts * (rearrange(nearest, "r n -> r 1 n") == rearrange(np.arange(k), "k -> k 1"))
        mass = reduce(member, "r k n -> r k 1", "sum")
        moved = np.where(mass > 0, member @ points / np.maximum(mass, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    squares = _squares(points, centres)
    best = int((squares.min(axis=1) @ counts).argmin())
    return centres[best], squares[best].argmin(axis=0)


def _spread_centres(points: Array, counts: NDArray[np.int64], k: int, rng: np.random.Generator) -> Array:
    """Draw the first centre by the counts, and each next one by its squared distance from those before."""
    centres = points[[rng.choice(len(points), p=counts / counts.sum())]]
    while len(centres) < k:
        mass = counts * _squares(points, rearrange(centres, "k c -> 1 k c"))[0].min(axis=0)
        centres = np.concatenate([centres, points[[rng.choice(len(points), p=mass / mass.sum())]]])
    return centres


def _squares(points: Array, centres: Array) -> Array:
    """Compute the squared distances of points `n c` from centres `r k c`: `r k n`."""
    apart = rearrange(points, "n c -> c n") - rearrange(centres, "r k c -> r k c 1")
    return np.asarray(np.square(apart).sum(axis=2))
