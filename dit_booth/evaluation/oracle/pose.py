"""Poses of a subject in a frame, and their refinement by damped least squares on the rendered pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from dit_booth.data.toyworld.shapes import Plane

Array = NDArray[np.float64]
Poses = Array
"""`n 4`: centre x (right) and y (down) and radius, in shares of the frame's side, and angle in radians."""
Draw = Callable[[Plane, Plane, Plane], Plane]
"""The subject's own coordinates x and y, `n h w`, and pixels per radius, `n 1 1`, to the pixels' values, `n c h w`."""

_ITERATIONS = 3
_DAMPING = 1e-2


def local(poses: Poses, mirrored: NDArray[np.bool_], side: int) -> tuple[Plane, Plane, Plane]:
    """Return the subject's own coordinates of every pixel (x right, y up), `n s s`, and pixels per radius, `n 1 1`."""
    grid = (np.arange(side) + 0.5) / side
    centre_x, centre_y, radius, angle = rearrange(poses, "n p -> p n 1")
    sign = np.where(mirrored, -1, 1)[:, None]
    cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
    right, up = grid - centre_x, centre_y - grid
    along_x, down_x, along_y, down_y = (
        term.astype(np.float32) for term in (sign * cos * right, sign * sin * up, -sin * right, cos * up)
    )
    x = rearrange(along_x, "n w -> n 1 w") + rearrange(down_x, "n h -> n h 1")
    y = rearrange(along_y, "n w -> n 1 w") + rearrange(down_y, "n h -> n h 1")
    return x, y, rearrange(radius * side, "n 1 -> n 1 1").astype(np.float32)


def sample(images: Plane, x: Array, y: Array) -> Plane:
    """Sample images `f c s s` bilinearly on grids of columns `x` and rows `y`, `f g` each in pixels: `f c g g`.

    Pixel centres are at whole numbers; beyond the frame its nearest pixels continue.
    """
    size = images.shape[-1]
    across, down = (_hats(each, size) for each in (x, y))
    sampled: Plane = rearrange(down, "f g s -> f 1 g s") @ images @ rearrange(across, "f g s -> f 1 s g")
    return sampled


def sample_around(images: Plane, poses: Poses, grid: Plane) -> Plane:
    """Sample images `f c s s` on a square grid around poses, `g` steps in radii, not turned: `f c g g`."""
    x, y, radius = (rearrange(images.shape[-1] * column, "f -> f 1") for column in poses.T[:3])
    return sample(images, x + radius * grid - 0.5, y - radius * grid - 0.5)


def _hats(at: Array, size: int) -> Plane:
    """Return the weights of linear interpolation between `size` pixels, `f g s`."""
    inside = rearrange(np.clip(at, 0, size - 1), "f g -> f g 1")
    return np.asarray(np.maximum(0, 1 - np.abs(inside - np.arange(size))), np.float32)


def fold(bank: Plane, tolerance: float) -> int:
    """Return the largest number of equal rotations that leave a subject as it is; the number of angles if all do.

    Args:
        bank: renders of the subject at equally spaced angles of the full circle, `angles ...`.
        tolerance: difference that counts as none, as a share of the mean magnitude.
    """
    count, size = len(bank), float(np.abs(bank[0]).mean())
    apart = np.array([float(np.abs(bank[0] - each).mean()) for each in bank])
    orders = [order for order in range(count, 0, -1) if count % order == 0]
    return next(order for order in orders if (apart[:: count // order] <= tolerance * size).all())


def first_of_each(group: NDArray[np.int64], loss: Array) -> NDArray[np.int64]:
    """Return the index of the lowest loss of each group, in the order of the groups' numbers."""
    order = np.lexsort((loss, group))
    return order[np.unique(group[order], return_index=True)[1]]


def nearly_best(losses: Array, count: int, factor: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows and columns of each row's lowest local minima along a circle, `f a`.

    At most `count` of a row, and only those below `factor` times its lowest.
    """
    lowest = (losses <= np.roll(losses, 1, axis=1)) & (losses <= np.roll(losses, -1, axis=1))
    columns = np.argsort(np.where(lowest, losses, np.inf), axis=1)[:, :count]
    kept = np.take_along_axis(losses, columns, axis=1)
    rows, ranks = np.nonzero(kept <= factor * np.maximum(kept[:, :1], 1e-9))
    return rows, columns[rows, ranks]


def refine(
    draw: Draw, target: Plane, start: Poses, mirrored: NDArray[np.bool_], *, iterations: int = _ITERATIONS
) -> tuple[Poses, Array]:
    """Minimise the squared difference of drawn pixels and a target by the Levenberg-Marquardt method.

    Args:
        draw: draws all `n` subjects at their own coordinates.
        target: `n c h w`.
        start: `n 4`; one iteration moves an outline by at most two pixels.
        mirrored: subjects that are drawn mirrored, `n`.

    Returns:
        The best poses, `n 4`, and their sums of squares, `n`; never worse than the start.
    """
    side = target.shape[-1]
    best, trial, loss = start.copy(), start, np.full(len(start), np.inf)
    damping, normal, wanted = (
        np.full(len(start), _DAMPING),
        np.zeros((len(start), 4, 4)),
        np.zeros_like(start),
    )
    for iteration in range(iterations + 1):
        x, y, pixels = local(trial, mirrored, side)
        drawn = draw(x, y, pixels)
        residual = target - drawn
        trial_loss = np.square(residual).sum(axis=(1, 2, 3), dtype=np.float64)
        better = trial_loss < loss
        best[better], loss[better] = trial[better], trial_loss[better]
        if iteration == iterations:
            break
        damping = np.where(better, damping / 4, damping * 8)
        # Differences over half a pixel smooth the kinks of anti-aliased outlines.
        step = np.float32(0.5) / pixels
        per_step = rearrange(1 / step, "n 1 1 -> n 1 1 1")
        gradient = (
            (draw(x + step, y, pixels) - drawn) * per_step,
            (draw(x, y + step, pixels) - drawn) * per_step,
        )
        slopes = rearrange(_slopes(gradient, x, y, trial, mirrored), "n p c h w -> n p (c h w)")
        normal[better] = (slopes @ rearrange(slopes, "n p m -> n m p"))[better]
        wanted[better] = (slopes @ rearrange(residual, "n c h w -> n (c h w) 1"))[better, :, 0]
        trial = best + _solve(normal, wanted, damping, best[:, 2], side)
    return best, loss


def _slopes(
    gradient: tuple[Plane, Plane], x: Plane, y: Plane, poses: Poses, mirrored: NDArray[np.bool_]
) -> Plane:
    """Return the derivative of every pixel by every parameter of its pose, `n p c h w`, by the chain rule."""
    by_x, by_y = gradient
    x, y = (rearrange(each, "n h w -> n 1 h w") for each in (x, y))
    scale = rearrange(1 / poses[:, 2], "n -> n 1 1 1").astype(np.float32)
    sign = rearrange(np.where(mirrored, -1, 1), "n -> n 1 1 1").astype(np.float32)
    cos, sin = (rearrange(f(poses[:, 3]), "n -> n 1 1 1").astype(np.float32) for f in (np.cos, np.sin))
    slopes = np.empty((len(poses), 4, *by_x.shape[1:]), np.float32)
    slopes[:, 0] = by_x * (-sign * cos * scale) + by_y * (sin * scale)
    slopes[:, 1] = by_x * (sign * sin * scale) + by_y * (cos * scale)
    slopes[:, 2] = by_x * (-scale * x) + by_y * (-scale * y)
    slopes[:, 3] = by_x * (sign * y) - by_y * (sign * x)
    return slopes


def _solve(normal: Array, wanted: Array, damping: Array, radius: Array, side: int) -> Array:
    """Solve the damped normal equations, `n 4`, and bound each step to two pixels at the outline."""
    diagonal = rearrange(np.diagonal(normal, axis1=1, axis2=2), "n p -> n p 1") * np.eye(4)
    damped = normal + rearrange(damping, "n -> n 1 1") * diagonal + 1e-9 * np.eye(4)
    bound = np.full_like(wanted, 2 / side)
    bound[:, 3] /= radius
    return np.clip(np.linalg.solve(damped, wanted[..., None])[..., 0], -bound, bound)
