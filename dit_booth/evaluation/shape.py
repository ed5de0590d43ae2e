"""Shape fidelity in the toy world: overlap of the segmented subject with the best-fitting pose of its shape.

No network is needed: the outlines are known, and few poses fit a mask of a given area and center.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.data.toyworld.shapes import SHAPES
from dit_booth.evaluation.segment import subject_mask

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_ANGLES = np.radians(np.arange(0, 360, 10))
_KEPT = 3  # poses that the second search refines
# The second search: offsets of the center in pixels, of the radius as a fraction, and of the angle.
_NEARBY = np.stack(
    np.meshgrid(
        (-1.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (-0.08, 0.0, 0.08), np.radians((-5, 0, 5)), indexing="ij"
    ),
    -1,
).reshape(-1, 4)


def video_shape_overlap(video: Tensor, shape: str) -> float:
    """Compute the mean IoU over frames of the segmented subject and its best-fitting pose.

    1 is best; the toy world's own videos of 32 x 32 pixels have about 0.95.

    Args:
        video: `f 3 h w` in [-1, 1], its background smooth.
        shape: a key of `SHAPES`.

    Raises:
        ValueError: there is no such shape, or a frame has the wrong shape.
    """
    return float(np.mean([shape_overlap(subject_mask(frame), shape) for frame in video]))


def shape_overlap(mask: Tensor, shape: str) -> float:
    """Compute the overlap of one mask (`h w` bool, on the CPU) with its best-fitting pose; 0 if the mask is empty."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; choose one of {', '.join(SHAPES)}")
    seen: Mask = mask.numpy()
    if not seen.any():
        return 0.0
    poses = _poses(seen, shape)
    best = poses[np.argsort(_overlaps(seen, shape, poses))[-_KEPT:]]
    near = best[:, None] + _NEARBY
    near[..., 2] = best[:, None, 2] * (1 + _NEARBY[:, 2])  # growth is a share
    return float(_overlaps(seen, shape, near.reshape(-1, 4)).max())


def best_shape(mask: Tensor) -> str:
    """Return the shape that overlaps most with a mask (`h w` bool)."""
    return max(SHAPES, key=lambda shape: shape_overlap(mask, shape))


def _poses(seen: Mask, shape: str) -> Array:
    """Return poses of the mask's area and centroid, one for each angle: centre x, y and radius in pixels, angle."""
    rows, columns = seen.nonzero()
    area, (right, up) = _moments(shape)
    radius = math.sqrt(len(rows) / area)
    cos, sin = np.cos(_ANGLES), np.sin(_ANGLES)
    x = columns.mean() - radius * (cos * right - sin * up)
    y = rows.mean() + radius * (sin * right + cos * up)  # rows run down
    return np.stack([x, y, np.full_like(x, radius), _ANGLES], -1)


def _overlaps(seen: Mask, shape: str, poses: Array) -> Array:
    """Compute the intersection over union of a mask and the shape in each of the poses."""
    x, y, radius, angle = (column[:, None, None] for column in poses.T)
    columns, rows = (_reach(at, radius, size) for at, size in ((x, seen.shape[1]), (y, seen.shape[0])))
    right, up = (columns - x) / radius, (y - rows[:, None]) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    posed = SHAPES[shape](cos * right + sin * up, cos * up - sin * right) < 0
    both = (posed & seen[rows[:, None], columns]).sum((1, 2))
    return np.asarray(both / (posed.sum((1, 2)) + seen.sum() - both))


def _reach(at: Array, radius: Array, size: int) -> NDArray[np.int64]:
    """Return the pixels of an axis that a shape in any of the poses may cover: it fits the unit circle."""
    return np.arange(max(0, math.floor((at - radius).min())), min(size, math.ceil((at + radius).max()) + 1))


@cache
def _moments(shape: str) -> tuple[float, tuple[float, float]]:
    """Compute area and centroid (right, up) of a shape in units of its radius."""
    grid = np.linspace(-1.05, 1.05, 211)
    x, y = np.meshgrid(grid, grid)
    inside = SHAPES[shape](x, y) < 0
    cell = float(grid[1] - grid[0]) ** 2
    return float(inside.sum()) * cell, (float(x[inside].mean()), float(y[inside].mean()))
