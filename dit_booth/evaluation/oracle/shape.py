"""Shape of the subject in a frame: the best-fitting pose of each shape, and its overlap with what is seen.

A shape is compared with a bank of templates at all angles, in coordinates normalised by the seen area and centroid;
its best angles are refined on the frame's own pixels. The overlap is the intersection over union of coverages:
`sum min(seen, rendered) / sum max(seen, rendered)`, where a pixel of the outline counts with its share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from einops import rearrange
from torch import Tensor

from dit_booth.data.toyworld.looks import draw_looks
from dit_booth.data.toyworld.shapes import SHAPES, coverage
from dit_booth.data.toyworld.world import render_video, sample_identity
from dit_booth.evaluation.oracle.pose import (
    Array,
    Poses,
    first_of_each,
    fold,
    local,
    nearly_best,
    refine,
    sample,
)
from dit_booth.evaluation.oracle.seen import FIT_SIDE, Plane, see
from dit_booth.evaluation.segment import subject_masks

ANGLES = np.radians(np.arange(0, 360, 6))
_GRID = np.linspace(-1.25, 1.25, 32, dtype=np.float32)  # of the templates, in square roots of the seen area
_KEPT = 2  # angles of each shape that are refined, if the next one's template fits nearly as well
_NEARLY = 1.5
_SAME = 0.005  # difference of templates that rotate into each other
_RIVALS = 4  # shapes beside the true one that are refined: those whose templates fit best
_EXAMPLES = 4  # videos of a shape that its floor and ceiling are measured on


@dataclass(frozen=True)
class ShapeFit:
    """The best pose of a shape in every frame, `f 4`, and its overlap with the seen coverage, `f`."""

    poses: Poses
    overlap: Array


@dataclass(frozen=True)
class Match:
    """The true shape's fit in every frame, and the overlap of the best wrong shape, `f`."""

    true: ShapeFit
    wrong: Array


def match_shapes(cover: Plane, shape: str) -> Match:
    """Fit the true shape and its strongest rivals to the coverage of every frame, `f s s`, none of them empty."""
    seen = _compare_templates(cover)
    rivals = tuple(name for name in SHAPES if name != shape)
    return Match(_refine_shape(seen, shape), _strongest(seen, rivals).max(axis=0))


def shape_overlaps(video: Tensor, shape: str) -> Array:
    """Compute the overlap of every frame's subject with the best pose of a shape, `f`; 0 where there is no subject.

    Args:
        video: `f 3 s s` in [-1, 1], its background smooth.
        shape: a key of `SHAPES`.

    Raises:
        ValueError: there is no such shape, or the video has the wrong shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; choose one of {', '.join(SHAPES)}")
    seen = see(video, subject_masks(video), side=FIT_SIDE)
    overlaps = np.zeros(len(video))
    if seen.found.any():
        overlaps[seen.found] = _refine_shape(_compare_templates(seen.cover[seen.found]), shape).overlap
    return overlaps


def best_shapes(video: Tensor) -> list[str]:
    """Return the shape that overlaps most with the subject of each frame of a video `f 3 s s`; empty if it has none."""
    seen, names = see(video, subject_masks(video), side=FIT_SIDE), np.array(list(SHAPES))
    best = np.full(len(video), "", dtype=names.dtype)
    if seen.found.any():
        overlaps = _strongest(_compare_templates(seen.cover[seen.found]), tuple(SHAPES))
        best[seen.found] = names[overlaps.argmax(axis=0)]
    return [str(name) for name in best]


@cache
def overlap_bounds(shape: str, side: int) -> tuple[float, float]:
    """Measure a shape's floor and ceiling: mean overlap of the wrong shapes and of the true one with exact renders.

    Seen are the first and last frames of a few subjects of this shape, segmented as any other frame.
    """
    rng = np.random.default_rng(list(SHAPES).index(shape))
    floors, ceilings = list[Array](), list[Array]()
    for _ in range(_EXAMPLES):
        identity = replace(sample_identity(rng, draw_looks(rng, "train", 0)), shape=shape)
        video, _ = render_video(identity, frames=2, size=side)
        cover = see(video, subject_masks(video)).cover
        seen = _compare_templates(cover)
        for name in SHAPES:
            fit = _refine_shape(seen, name)
            (ceilings if name == shape else floors).append(fit.overlap)
    return float(np.mean(floors)), float(np.mean(ceilings))


def overlap(a: Plane, b: Plane) -> Array:
    """Compute the intersection over union of coverages, `n h w` each: `n`."""
    union = np.maximum(a, b).sum(axis=(1, 2), dtype=np.float64)
    return np.asarray(np.minimum(a, b).sum(axis=(1, 2), dtype=np.float64) / np.maximum(union, 1e-9))


def centroid(shape: str) -> tuple[float, float]:
    """Return a shape's centroid (right, up) in units of its radius."""
    return _templates(shape)[1]


@dataclass(frozen=True)
class _Compared:
    """Coverages compared with all templates.

    Attributes:
        cover: `f s s`.
        centre, scale: centroid (x, y), `f 2`, and square root of the area, `f`, in shares of the side.
        losses: for each shape the squared differences from its templates, `f angles`.
    """

    cover: Plane
    centre: Array
    scale: Array
    losses: dict[str, Array]


def _strongest(seen: _Compared, names: tuple[str, ...]) -> Array:
    """Return the overlaps of shapes, `shapes f`: only of the `_RIVALS` whose templates fit best; 0 of the others."""
    order = np.argsort(np.argsort([seen.losses[name].min(axis=1) for name in names], axis=0), axis=0)
    overlaps = np.zeros(order.shape)
    for name, rank, each in zip(names, order, overlaps, strict=True):
        near = rank < _RIVALS
        if near.any():
            chosen = _Compared(
                seen.cover[near], seen.centre[near], seen.scale[near], {name: seen.losses[name][near]}
            )
            each[near] = _refine_shape(chosen, name).overlap
    return overlaps


def _refine_shape(seen: _Compared, shape: str) -> ShapeFit:
    """Refine the best angles of a shape on the pixels, and keep the better pose of every frame."""
    cover, (area, middle, _) = seen.cover, _templates(shape)
    frame, which = nearly_best(seen.losses[shape], _KEPT, _NEARLY)
    angle, radius, (x, y) = ANGLES[which], seen.scale[frame] / math.sqrt(area), seen.centre[frame].T
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = x - radius * (cos * middle[0] - sin * middle[1]), y + radius * (sin * middle[0] + cos * middle[1])
    start = np.stack([x, y, radius, angle], axis=1)

    mirrored = np.zeros(len(start), bool)

    def draw(x: Plane, y: Plane, pixels: Plane) -> Plane:
        return rearrange(coverage(SHAPES[shape](x, y), pixels), "n h w -> n 1 h w")

    poses, loss = refine(draw, rearrange(cover[frame], "n h w -> n 1 h w"), start, mirrored)
    best = poses[first_of_each(frame, loss)]
    return ShapeFit(best, overlap(cover, draw(*local(best, mirrored[: len(best)], cover.shape[-1]))[:, 0]))


def _compare_templates(cover: Plane) -> _Compared:
    """Compare every frame's coverage, none of them empty, with every template."""
    side = cover.shape[-1]
    grid = (np.arange(side) + 0.5) / side
    mass = cover.sum(axis=(1, 2), dtype=np.float64)
    x, y = (cover.sum(axis=1) @ grid / mass, cover.sum(axis=2) @ grid / mass)
    scale = np.sqrt(mass) / side
    # A margin of zeros around the frame, so that nothing is seen beyond it.
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))[:, None]
    steps = side * rearrange(scale, "f -> f 1") * _GRID + 0.5
    columns, rows = side * rearrange(x, "f -> f 1") + steps, side * rearrange(y, "f -> f 1") - steps + 1
    normal = rearrange(sample(padded, columns, rows), "f 1 h w -> f (h w)")
    square = np.square(normal).sum(axis=1)[:, None]
    losses = {}
    for shape in SHAPES:
        bank = _templates(shape)[2]
        losses[shape] = (square - 2 * normal @ bank.T + np.square(bank).sum(axis=1)).astype(np.float64)
    return _Compared(cover, np.stack([x, y], axis=1), scale, losses)


@cache
def _templates(shape: str) -> tuple[float, tuple[float, float], Plane]:
    """Return a shape's area and centroid (right, up) in units of its radius, and its templates, `angles (y x)`.

    The angles go up to the shape's first rotation into itself: one for a circle, 15 of `ANGLES` for a square.
    """
    fine = np.linspace(-1.05, 1.05, 211)
    x, y = np.meshgrid(fine, fine)
    inside = SHAPES[shape](x, y) < 0
    area = float(inside.sum()) * float(fine[1] - fine[0]) ** 2
    middle = float(x[inside].mean()), float(y[inside].mean())
    radius = 1 / math.sqrt(area)
    cos, sin = (rearrange(f(ANGLES).astype(np.float32), "a -> a 1 1") for f in (np.cos, np.sin))
    right, up = _GRID[None, None, :] / np.float32(radius), _GRID[None, :, None] / np.float32(radius)
    posed = SHAPES[shape](
        cos * right + sin * up + np.float32(middle[0]), cos * up - sin * right + np.float32(middle[1])
    )
    cell = float(_GRID[1] - _GRID[0])
    bank = rearrange(coverage(posed, radius / cell), "a h w -> a (h w)").astype(np.float32)
    return area, middle, bank[: len(bank) // fold(bank, _SAME)]
