"""The true subject's best-fitting pose in every frame, and the motion that follows from it.

The starting point is the pose of the true shape (`shape`). The angle, which the texture decides where the outline does
not, and whether the subject is mirrored, come from a bank of exact renders at all angles; the best are refined on
the frame's own pixels. The loss is the squared difference of colours plus that of coverages, so that a subject in
wrong colours still lies on what is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from dit_booth.data.toyworld.shapes import Plane
from dit_booth.data.toyworld.world import Identity, paint
from dit_booth.evaluation.oracle.pose import (
    Array,
    Poses,
    first_of_each,
    fold,
    local,
    nearly_best,
    refine,
    sample_around,
)
from dit_booth.evaluation.oracle.seen import Seen
from dit_booth.evaluation.oracle.shape import ANGLES, centroid

_GRID = np.linspace(-1.3, 1.3, 36, dtype=np.float32)  # of the bank, around the centroid, in radii
_KEPT = 3  # angles that are refined, if the next one's render fits nearly as well
_NEARLY = 1.5
_EQUAL = 0.005  # difference of renders that are equal
_SAME = 0.04  # difference that a viewer hardly sees, as that of a nearly regular triangle turned by a third
_JUMP = math.radians(60)  # rotation between frames that weighs as much as doubling the loss
_COVER = 0.7  # weight of a pixel's coverage in the loss, as the distance of colours in RGB that it equals


@dataclass(frozen=True)
class Track:
    """The poses of a subject in the frames of a video.

    Attributes:
        poses: `f 4`: centre x (right) and y (down) and radius in shares of the side, angle in radians, NaN where no
            subject is found.
        mirrored: the subject is drawn mirrored, as an image prompt may show it.
        turns: equal rotations that leave the outline as it is (for a circle or a ring: outline and texture); angles
            count modulo these. 1 if none does, 0 if all do (a plain circle).
    """

    poses: Poses
    mirrored: bool
    turns: int

    @property
    def angles(self) -> Array:
        """Return the angles unwrapped over the frames modulo the symmetry, starting in half a period around 0."""
        known, angles = ~np.isnan(self.poses[:, 3]), self.poses[:, 3].copy()
        period = 2 * math.pi / max(self.turns, 1)
        start = angles[known][:1] - period * np.round(angles[known][:1] / period)
        angles[known] = np.unwrap(np.concatenate([start, angles[known][1:]]), period=period)
        return angles

    def motion(self) -> dict[str, Array]:
        """Return `speed`, `growth` and `rotation` (degrees) to the frame before, `f` each; NaN where unknown."""
        step = np.full_like(self.poses, np.nan)
        step[1:] = self.poses[1:] - self.poses[:-1]
        step[1:, 3] = np.diff(self.angles)
        growth = np.full(len(step), np.nan)
        growth[1:] = np.abs(self.poses[1:, 2] / self.poses[:-1, 2] - 1)
        rotation = np.degrees(np.abs(step[:, 3])) if self.turns else np.full(len(step), np.nan)
        return {"speed": np.hypot(step[:, 0], step[:, 1]), "growth": growth, "rotation": rotation}


def fit_subject(seen: Seen, identity: Identity, start: Poses) -> Track:
    """Fit the pose of a subject in every frame in which one is found; `start`, `f 4`, are its shape's poses there.

    It is mirrored in all frames or in none. Where several poses fit a frame about as well, as with the wrong texture on
    a square, the one that continues the motion is taken.
    """
    found, (bank, mirror_bank) = seen.found, _banks(identity)
    images, ground = _channels(seen.only(found))
    middle = _centroids(start, identity.shape)
    period = slice(len(ANGLES) // fold(bank, _EQUAL))
    flips = [False] if _same_turned(bank, mirror_bank) else [False, True]
    fits = []
    for flip in flips:
        losses = _bank_losses(images, ground, middle, (mirror_bank if flip else bank)[period])
        fits.append(_smoothest(*_refine(images, ground, identity, middle, losses, flip), _turns(bank)))
    mirrored = flips[int(np.argmin([loss for _, loss in fits]))]
    poses = np.full((len(found), 4), np.nan)
    poses[found] = fits[int(mirrored)][0]
    return Track(poses, mirrored, _turns(bank))


def render_subject(identity: Identity, track: Track, ground: Plane) -> tuple[Plane, Plane]:
    """Render the subject over backgrounds `f 3 s s`: the frames in RGB, and the coverage, `f s s`.

    Where a pose is unknown, the subject lies in the middle of the frame, at its usual size.
    """
    usual = np.array([0.5, 0.5, identity.radius, identity.angle])
    poses = np.where(np.isnan(track.poses), usual, track.poses)
    mirrored = np.full(len(poses), track.mirrored)
    x, y, pixels = local(poses, mirrored, ground.shape[-1])
    alpha, colour = paint(identity, x, y, pixels=pixels)
    return ground + (colour - ground) * rearrange(alpha, "f h w -> f 1 h w"), alpha


def _channels(seen: Seen) -> tuple[Plane, Plane]:
    """Return frames and backgrounds of four channels, `f 4 h w`: RGB, and the weighted coverage."""
    cover = rearrange(np.float32(_COVER) * seen.cover, "f h w -> f 1 h w")
    images = np.concatenate([seen.frames, cover], axis=1)
    return images, np.concatenate([seen.ground, np.zeros_like(cover)], axis=1)


def _paint(identity: Identity, x: Plane, y: Plane, pixels: Plane) -> tuple[Plane, Plane]:
    """Return the subject's coverage `n 1 h w` and its four channels, `n 4 h w`."""
    alpha, colour = paint(identity, x, y, pixels=pixels)
    alpha = rearrange(alpha, "n h w -> n 1 h w")
    return alpha, np.concatenate([colour, np.full_like(alpha, _COVER)], axis=1)


def _centroids(poses: Poses, shape: str) -> Poses:
    """Return poses with the shape's centroid in place of its centre."""
    return _moved(poses, *centroid(shape), mirrored=False)


def _moved(poses: Poses, right: float, up: float, *, mirrored: bool) -> Poses:
    """Return poses moved by a vector in the subject's own coordinates."""
    right = -right if mirrored else right
    cos, sin = np.cos(poses[:, 3]), np.sin(poses[:, 3])
    moved = poses.copy()
    moved[:, 0] += poses[:, 2] * (cos * right - sin * up)
    moved[:, 1] -= poses[:, 2] * (sin * right + cos * up)
    return moved


def _refine(
    images: Plane, ground: Plane, identity: Identity, middle: Poses, losses: Array, flip: bool
) -> tuple[NDArray[np.int64], Poses, Array]:
    """Refine the best angles around the centroids; return each candidate's frame, `n`, pose, `n 4`, and loss, `n`."""
    frame, which = nearly_best(losses, _KEPT, _NEARLY)
    start = middle[frame]
    start[:, 3] = ANGLES[which]
    right, up = centroid(identity.shape)
    start = _moved(start, -right, -up, mirrored=flip)
    target, under = images[frame], ground[frame]

    def draw(x: Plane, y: Plane, pixels: Plane) -> Plane:
        alpha, colour = _paint(identity, x, y, pixels)
        return under + (colour - under) * alpha

    return frame, *refine(draw, target, start, np.full(len(start), flip))


def _smoothest(frame: NDArray[np.int64], poses: Poses, loss: Array, turns: int) -> tuple[Poses, float]:
    """Choose one candidate of every frame: least excess loss and least rotation, by the Viterbi algorithm.

    Returns:
        The poses, `f 4`, and the sum of their losses.
    """
    period = 2 * math.pi / max(turns, 1)
    excess = loss / np.maximum(np.repeat(loss[first_of_each(frame, loss)], np.bincount(frame)), 1e-9) - 1
    groups = [np.flatnonzero(frame == number) for number in range(int(frame[-1]) + 1)]
    cost, before = excess[groups[0]], list[NDArray[np.int64]]()
    for previous, group in pairwise(groups):
        turn = np.subtract.outer(poses[group, 3], poses[previous, 3])
        turn = np.abs(turn - period * np.round(turn / period))
        steps = cost + np.square(turn / _JUMP)
        before.append(steps.argmin(axis=1))
        cost = excess[group] + steps.min(axis=1)
    path = [int(cost.argmin())]
    for each in reversed(before):
        path.append(int(each[path[-1]]))
    chosen = np.array([group[at] for group, at in zip(groups, reversed(path), strict=True)])
    return poses[chosen], float(loss[chosen].sum())


def _turns(bank: Plane) -> int:
    """Return `Track.turns` of a subject from its renders, `angles 5 m`."""
    turns = fold(bank[:, :1], _SAME)
    turns = fold(bank, _SAME) if turns == len(ANGLES) else turns
    return 0 if turns == len(ANGLES) else turns


def _banks(identity: Identity) -> tuple[Plane, Plane]:
    """Render the subject at every angle around its centroid, as it is and mirrored.

    Returns:
        Coverage and premultiplied channels together, `angles 5 (y x)`, twice.
    """
    cell = float(_GRID[1] - _GRID[0])
    cos, sin = (rearrange(f(ANGLES).astype(np.float32), "a -> a 1 1") for f in (np.cos, np.sin))
    right, up = _GRID[None, None, :], _GRID[None, :, None]
    x, y, pixels = cos * right + sin * up, cos * up - sin * right, np.full((1, 1, 1), 1 / cell, np.float32)
    middle = np.asarray(centroid(identity.shape), np.float32)
    banks = []
    for sign in (1, -1):
        alpha, colour = _paint(identity, np.float32(sign) * x + middle[0], y + middle[1], pixels)
        banks.append(rearrange(np.concatenate([alpha, alpha * colour], axis=1), "a c h w -> a c (h w)"))
    return banks[0], banks[1]


def _same_turned(bank: Plane, mirror_bank: Plane) -> bool:
    """Return True if the mirrored subject is the subject at another angle."""
    apart = np.abs(bank - mirror_bank[0]).mean(axis=(1, 2)).min()
    return bool(apart <= _EQUAL * np.abs(bank).mean())


def _bank_losses(images: Plane, ground: Plane, middle: Poses, bank: Plane) -> Array:
    """Compare every frame with the bank's renders around `middle`: `f angles`.

    With frame I, background B, coverage a and colour C the loss is `sum |I - B - a (C - B)|^2`. It is expanded, so
    that matrix products compute it: `|I - B|^2 - 2 aC.(I - B) + 2 a B.(I - B) + |aC|^2 - 2 a aC.B + a^2 |B|^2`.
    """
    image, under = (
        rearrange(sample_around(each, middle, _GRID), "f c h w -> f c (h w)") for each in (images, ground)
    )
    alpha, colour = bank[:, 0], bank[:, 1:]
    flat, apart = rearrange(colour, "a c m -> a (c m)"), image - under
    both = rearrange(colour * alpha[:, None], "a c m -> a (c m)")
    loss = np.square(apart).sum(axis=(1, 2))[:, None] + np.square(flat).sum(axis=1)
    loss = (
        loss + (2 * (under * apart).sum(axis=1)) @ alpha.T + np.square(under).sum(axis=1) @ np.square(alpha).T
    )
    for frames, renders in ((apart, flat), (under, both)):
        loss -= 2 * rearrange(frames, "f c m -> f (c m)") @ renders.T
    return np.asarray(loss, np.float64)
