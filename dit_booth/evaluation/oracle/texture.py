"""Texture of the subject in a frame: the one that explains most of its colours.

Every texture is fitted at any direction, at scales around the usual one and with a slight shift, and its two colours are
estimated by least squares: colours, direction and scale of the true subject are the appearance's business, and a
texture of swapped colours is still that texture. A texture counts if it explains at least half of the variance by two
colours that a viewer can tell; a subject of which none does, and whose colours hardly vary, is plain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage

from dit_booth.data.toyworld.shapes import TEXTURES, Plane
from dit_booth.evaluation.oracle.pose import Array, Poses, local, refine
from dit_booth.evaluation.oracle.seen import Seen

_PATTERNS = tuple(name for name in TEXTURES if name != "plain")
_DIRECTIONS = np.radians(np.arange(0, 180, 15))
_SCALES = (0.75, 0.92, 1.12, 1.37)
_GRID = np.linspace(-1.05, 1.05, 32, dtype=np.float32)  # of the bank, in units of the radius
_EXPLAINED = 0.5  # share of the variance that a texture must explain
_CONTRAST = 0.2  # least distance of its two colours in RGB; the toy world's differ by 0.45 or more
_EVEN = 0.12  # largest standard deviation (RGB) of a plain subject's colours


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over pixels that a fit of two colours needs; `...` are frames and patterns."""

    share: Array  # ...
    square: Array  # ...
    colour: Array  # ... c
    both: Array  # ... c
    power: Array  # ...


def name_textures(seen: Seen, poses: Poses) -> list[str]:
    """Return the best-fitting texture of every frame, all of which have a subject; empty where none fits.

    Args:
        seen: `f` frames.
        poses: the subject's poses, `f 4`: textures are centred on them.
    """
    inside = np.stack([_interior(mask) for mask in seen.masks])
    weight = inside / inside.sum(axis=(1, 2), keepdims=True, dtype=np.float32)
    starts = _starts(seen, inside, poses)
    variance, unexplained = _spread(seen.frames, weight), {}
    for name, (start, first, second) in starts.items():
        unexplained[name] = _fit_texture(seen.frames, weight, name, start, first, second)
    names = []
    for frame, spread in enumerate(variance):
        best = min(_PATTERNS, key=lambda name: unexplained[name][frame])
        if unexplained[best][frame] <= (1 - _EXPLAINED) * spread:
            names.append(best)
        else:
            names.append("plain" if spread <= _EVEN**2 else "")
    return names


def _interior(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask without its outline, whose colours are mixed; all of it if little would remain."""
    inside = ndimage.binary_erosion(mask, structure=np.ones((3, 3)), border_value=1)
    return inside if inside.sum() >= 0.3 * mask.sum() else mask


def _spread(frames: Plane, weight: Plane) -> Array:
    """Return the variance of the colours inside, summed over channels: `f`."""
    mean = (frames * weight[:, None]).sum(axis=(2, 3), keepdims=True)
    return np.asarray((np.square(frames - mean) * weight[:, None]).sum(axis=(1, 2, 3)), np.float64)


def _fit_texture(frames: Plane, weight: Plane, name: str, start: Poses, first: Plane, second: Plane) -> Array:
    """Refine a texture's pose, and return the variance that it leaves, `f`; all of it where its colours are alike."""
    root = np.sqrt(weight)[:, None]

    def draw(x: Plane, y: Plane, pixels: Plane) -> Plane:
        share = TEXTURES[name](x, y, 1, pixels)
        return (first + (second - first) * share[:, None]) * root

    still = np.zeros(len(start), bool)
    poses, _ = refine(draw, frames * root, start, still)
    share = TEXTURES[name](
        *local(poses, still, frames.shape[-1])[:2], 1, local(poses, still, frames.shape[-1])[2]
    )
    sums = _Sums(
        share=(weight * share).sum(axis=(1, 2)),
        square=(weight * share * share).sum(axis=(1, 2)),
        colour=(weight[:, None] * frames).sum(axis=(2, 3)),
        both=(weight[:, None] * share[:, None] * frames).sum(axis=(2, 3)),
        power=(weight[:, None] * frames * frames).sum(axis=(1, 2, 3)),
    )
    return _colours(sums)[2]


def _starts(seen: Seen, inside: NDArray[np.bool_], poses: Poses) -> dict[str, tuple[Poses, Plane, Plane]]:
    """Return each texture's best pose in the bank and its two colours, `f 3 1 1`."""
    sampled = np.stack([_resample(*each) for each in zip(seen.frames, inside, poses, strict=True)])
    weight = sampled[:, 3] / np.maximum(sampled[:, 3].sum(axis=1, keepdims=True), 1e-6)
    colour = sampled[:, :3] * weight[:, None]
    power = (np.square(sampled[:, :3]) * weight[:, None]).sum(axis=(1, 2))
    starts = {}
    for name in _PATTERNS:
        share, direction, scale = _bank(name)
        count = len(share)
        sums = _Sums(
            share=weight @ share.T,
            square=weight @ np.square(share).T,
            colour=np.broadcast_to(colour.sum(axis=2)[:, None], (len(poses), count, 3)),
            both=rearrange(colour @ share.T, "f c k -> f k c"),
            power=np.broadcast_to(power[:, None], (len(poses), count)),
        )
        first, second, left = _colours(sums)
        best = left.argmin(axis=1)
        every = np.arange(len(poses))
        start = poses.copy()
        start[:, 2] *= scale[best]
        start[:, 3] = direction[best]
        pair = (rearrange(each[every, best], "f c -> f c 1 1").astype(np.float32) for each in (first, second))
        starts[name] = (start, *pair)
    return starts


def _colours(sums: _Sums) -> tuple[Array, Array, Array]:
    """Fit two colours by least squares.

    Returns:
        First and second colour, `... c`, and the variance left, `...`: all of it where the colours are alike.
    """
    variance = np.maximum(sums.square - sums.share**2, 1e-6)
    step = (sums.both - sums.share[..., None] * sums.colour) / variance[..., None]
    first = sums.colour - sums.share[..., None] * step
    spread = sums.power - np.square(sums.colour).sum(axis=-1)
    length = np.square(step).sum(axis=-1)
    left = np.where(length >= _CONTRAST**2, spread - variance * length, spread)
    return first, first + step, np.maximum(left, 0)


def _resample(frame: Plane, inside: NDArray[np.bool_], pose: Array) -> Plane:
    """Sample RGB and the inside of a frame around a pose without turning it: `4 (y x)`."""
    side = frame.shape[-1]
    x, y, radius, _ = pose * side
    at = np.meshgrid(y - radius * _GRID - 0.5, x + radius * _GRID - 0.5, indexing="ij")
    channels = [*frame, inside.astype(np.float32)]
    sampled = np.stack([ndimage.map_coordinates(each, at, order=1, mode="constant") for each in channels])
    sampled[3] = sampled[3] > 0.99  # colours from inside alone
    return rearrange(sampled, "c h w -> c (h w)")


@cache
def _bank(name: str) -> tuple[Plane, Array, Array]:
    """Return a texture at all directions and scales, `k (y x)`, and the direction and scale of each, `k`."""
    direction, scale = (each.ravel() for each in np.meshgrid(_DIRECTIONS, _SCALES, indexing="ij"))
    if name == "halved":  # has no scale
        direction, scale = _DIRECTIONS, np.ones_like(_DIRECTIONS)
    cos, sin = (rearrange((f(direction) / scale).astype(np.float32), "k -> k 1 1") for f in (np.cos, np.sin))
    right, up = _GRID[None, None, :], _GRID[None, :, None]
    pixels = rearrange(scale / float(_GRID[1] - _GRID[0]), "k -> k 1 1").astype(np.float32)
    share = TEXTURES[name](cos * right + sin * up, cos * up - sin * right, 1, pixels)
    return rearrange(share, "k h w -> k (h w)").astype(np.float32), direction, scale
