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
Render = Callable[[Array], Plane]
"""Parameters `n p` to pixels `n ...`."""

_ITERATIONS = 4
_DAMPING = 1e-2


def local(poses: Poses, mirrored: NDArray[np.bool_], side: int) -> tuple[Plane, Plane, Plane]:
    """Return the subject's own coordinates of every pixel (x right, y up), `n s s`, and pixels per radius, `n 1 1`."""
    grid = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    centre_x, centre_y, radius, angle = rearrange(poses.astype(np.float32), "n p -> p n 1 1")
    right, up = (grid[None, None, :] - centre_x) / radius, (centre_y - grid[None, :, None]) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    sign = np.where(mirrored, np.float32(-1), np.float32(1))[:, None, None]
    return sign * (cos * right + sin * up), cos * up - sin * right, radius * np.float32(side)


def pose_steps(poses: Poses, side: int) -> Array:
    """Return the change of each parameter that moves an outline by half a pixel, `n 4`."""
    half = np.full(len(poses), 0.5 / side)
    return np.stack([half, half, half, half / poses[:, 2]], axis=1)


def refine(
    render: Render, target: Plane, start: Array, steps: Array, *, iterations: int = _ITERATIONS
) -> tuple[Array, Array]:
    """Minimise the squared difference of rendered pixels and a target by the Levenberg-Marquardt method.

    Derivatives are differences over `steps`, which smooths the kinks of anti-aliased outlines.

    Args:
        render: parameters `n p` to pixels `n ...`.
        target: `n ...`.
        start: parameters, `n p`.
        steps: change of each parameter for the derivatives, `n p`; one iteration moves by at most four of them.

    Returns:
        The best parameters, `n p`, and their sums of squares, `n`; never worse than the start.
    """
    best, trial = start.copy(), start
    loss, damping = np.full(len(start), np.inf), np.full(len(start), _DAMPING)
    residual = np.zeros((len(start), target[0].size), np.float32)
    for iteration in range(iterations + 1):
        difference = rearrange(target - render(trial), "n ... -> n (...)")
        trial_loss = np.square(difference).sum(axis=1, dtype=np.float64)
        better = trial_loss < loss
        best[better], residual[better], loss[better] = trial[better], difference[better], trial_loss[better]
        if iteration == iterations:
            break
        damping = np.where(better, damping / 4, damping * 8)
        slopes = _slopes(render, target, residual, best, steps)
        normal = (slopes @ rearrange(slopes, "n p m -> n m p")).astype(np.float64)
        wanted = (slopes @ rearrange(residual, "n m -> n m 1")).astype(np.float64)
        diagonal = rearrange(np.diagonal(normal, axis1=1, axis2=2), "n p -> n p 1") * np.eye(normal.shape[1])
        normal += rearrange(damping, "n -> n 1 1") * diagonal + 1e-6 * np.eye(normal.shape[1])
        trial = best + steps * np.clip(np.linalg.solve(normal, wanted)[..., 0], -4, 4)
    return best, loss


def _slopes(render: Render, target: Plane, residual: Plane, at: Array, steps: Array) -> Plane:
    """Return the change of every pixel per step of every parameter, `n p m`."""
    now = rearrange(target, "n ... -> n (...)") - residual
    moved = [rearrange(render(at + steps * axis), "n ... -> n (...)") - now for axis in np.eye(at.shape[1])]
    return np.stack(moved, axis=1)
