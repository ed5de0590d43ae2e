"""Texture of the subject in a frame: the one that explains most of its colours.

Every texture is fitted at any direction, at scales around the usual one and with a slight shift, and its two colours
are estimated by least squares: colours, direction and scale of the true subject are the appearance's business, and a
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
from dit_booth.evaluation.oracle.pose import Array, Poses, local, refine, sample_around
from dit_booth.evaluation.oracle.seen import Seen

_PATTERNS = tuple(name for name in TEXTURES if name != "plain")
_DIRECTIONS = np.radians(np.arange(0, 180, 15))
_SCALES = (0.75, 0.92, 1.12, 1.37)
_GRID = np.linspace(-1.05, 1.05, 32, dtype=np.float32)  # of the bank, in units of the radius
_EXPLAINED = 0.5  # share of the variance that a texture must explain
_CONTRAST = 0.2  # least distance of its two colours in RGB; the toy world's differ by 0.45 or more
_SEEN = 0.02  # least variance of the second colour's share: one of the colours covers 2% of the subject
_NEARLY = 0.2  # share of the variance by which a texture that is refined may be behind the best of the bank
_EVEN = 0.12  # largest standard deviation (RGB) of a plain subject's colours


@dataclass(frozen=True)
class _Start:
    """A texture's best pose in the bank, `f 4`, its two colours, `f 3 1 1`, and the variance it explains, `f`."""

    poses: Poses
    first: Plane
    second: Plane
    explained: Array

    def only(self, frames: NDArray[np.bool_]) -> _Start:
        return _Start(self.poses[frames], self.first[frames], self.second[frames], self.explained[frames])


def name_textures(seen: Seen, poses: Poses) -> list[str]:
    """Return the best-fitting texture of every frame, all of which have a subject; empty where none fits.

    Args:
        seen: `f` frames.
        poses: the subject's poses, `f 4`: textures are centred near them.
    """
    inside = np.stack([_interior(mask) for mask in seen.masks])
    weight = inside / inside.sum(axis=(1, 2), keepdims=True, dtype=np.float32)
    starts = _starts(seen, inside, poses)
    spread, explained = _spread(seen.frames, weight), np.zeros((len(_PATTERNS), len(poses)))
    hope = np.stack([start.explained for start in starts])
    for name, start, share, most in zip(_PATTERNS, starts, explained, hope, strict=True):
        near = hope.max(axis=0) - most <= _NEARLY * spread
        if near.any():
            share[near] = _fit_texture(seen.frames[near], weight[near], name, start.only(near))
    best = explained.argmax(axis=0)
    fits = explained.max(axis=0) > _EXPLAINED * spread
    plain = np.where(spread <= _EVEN**2, "plain", "")
    return [str(name) for name in np.where(fits, np.array(_PATTERNS)[best], plain)]


def _interior(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the mask without its outline, whose colours are mixed; all of it if little would remain."""
    inside = ndimage.binary_erosion(mask, structure=np.ones((3, 3)), border_value=1)
    return inside if inside.sum() >= 0.3 * mask.sum() else mask


def _spread(frames: Plane, weight: Plane) -> Array:
    """Return the variance of the colours inside, summed over channels: `f`."""
    mean = (frames * weight[:, None]).sum(axis=(2, 3), keepdims=True)
    return np.asarray((np.square(frames - mean) * weight[:, None]).sum(axis=(1, 2, 3)), np.float64)


def _fit_texture(frames: Plane, weight: Plane, name: str, start: _Start) -> Array:
    """Refine a texture's pose, and return the variance that it explains, `f`."""
    root, still = np.sqrt(weight)[:, None], np.zeros(len(frames), bool)

    def draw(x: Plane, y: Plane, pixels: Plane) -> Plane:
        share = TEXTURES[name](x, y, 1, pixels)
        return (start.first + (start.second - start.first) * share[:, None]) * root

    poses, _ = refine(draw, frames * root, start.poses, still)
    x, y, pixels = local(poses, still, frames.shape[-1])
    share = rearrange(TEXTURES[name](x, y, 1, pixels), "f h w -> f 1 (h w)")
    weight, colour = rearrange(weight, "f h w -> f (h w)"), rearrange(frames, "f c h w -> f c (h w)")
    return _fit_colours(weight, colour, share)[2][:, 0]


def _starts(seen: Seen, inside: NDArray[np.bool_], poses: Poses) -> list[_Start]:
    """Return the best start of each of `_PATTERNS`."""
    images = np.concatenate([seen.frames, inside[:, None].astype(np.float32)], axis=1)
    sampled = rearrange(sample_around(images, poses, _GRID), "f c h w -> f c (h w)")
    colour, weight = sampled[:, :3], (sampled[:, 3] > 0.99).astype(np.float32)  # colours from inside alone
    weight = weight / np.maximum(weight.sum(axis=1, keepdims=True), 1e-6)
    starts, every = [], np.arange(len(poses))
    for name in _PATTERNS:
        share, direction, scale = _bank(name)
        first, second, explained = _fit_colours(weight, colour, share)
        best = explained.argmax(axis=1)
        start = poses.copy()
        start[:, 2] *= scale[best]
        start[:, 3] = direction[best]
        one, two = (
            rearrange(each[every, best], "f c -> f c 1 1").astype(np.float32) for each in (first, second)
        )
        starts.append(_Start(start, one, two, explained[every, best]))
    return starts


def _fit_colours(weight: Plane, colour: Plane, share: Plane) -> tuple[Array, Array, Array]:
    """Fit two colours to each pattern by least squares.

    Args:
        weight: of the pixels, `f m`; the weights of a frame sum to 1.
        colour: `f c m`.
        share: weight of the second colour, `k m` or `f k m`.

    Returns:
        First and second colour, `f k c`, and the variance explained, `f k`: none where the colours are alike, or one
        of them is hardly seen.
    """
    weighted = rearrange(weight, "f m -> f m 1")
    mean = rearrange((colour @ weighted)[..., 0].astype(np.float64), "f c -> f 1 c")
    middle = (share @ weighted).astype(np.float64)  # f k 1
    variance = (np.square(share) @ weighted).astype(np.float64) - middle**2
    both = share @ (weighted * rearrange(colour, "f c m -> f m c"))
    step = (both - middle * mean) / np.maximum(variance, _SEEN)
    first = mean - middle * step
    length = np.square(step).sum(axis=-1)
    valid = (length >= _CONTRAST**2) & (variance[..., 0] >= _SEEN)
    return first, first + step, np.where(valid, variance[..., 0] * length, 0)


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
