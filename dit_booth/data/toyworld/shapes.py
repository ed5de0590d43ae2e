"""Shapes and textures of the toy world, as signed distances in the subject's own coordinates.

`x` points right and `y` up; every shape fits the unit circle. A shape function returns the signed distance to
the outline: negative inside, in units of the subject's radius, exact to first order near the
outline, where anti-aliasing uses it. A texture function returns the weight of the second colour, in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]
ShapeFunction = Callable[[Plane, Plane], Plane]
TextureFunction = Callable[[Plane, Plane, float, Plane], Plane]


def _disc(x: Plane, y: Plane, cx: float, cy: float, radius: float) -> Plane:
    distance: Plane = np.hypot(x - np.float32(cx), y - np.float32(cy)) - np.float32(radius)
    return distance


def _box(x: Plane, y: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height))


def _line(x: Plane, y: Plane, start: tuple[float, float], end: tuple[float, float]) -> Plane:
    """Signed distance to the line from `start` to `end`; negative on its left."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    nx, ny = dy / length, -dx / length
    return np.float32(nx) * x + np.float32(ny) * y - np.float32(nx * start[0] + ny * start[1])


def _polygon(x: Plane, y: Plane, corners: list[tuple[float, float]]) -> Plane:
    """A convex polygon; corners counter-clockwise."""
    edges = [_line(x, y, a, b) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
    distance: Plane = np.maximum.reduce(edges)
    return distance


def _fold(x: Plane, y: Plane, count: int) -> tuple[Plane, Plane]:
    """Map the plane onto one half of a sector around the upward axis, by `count`-fold symmetry."""
    radius = np.hypot(x, y)
    sector = np.float32(2 * math.pi / count)
    angle = np.arctan2(x, y)
    angle = np.abs(angle - sector * np.round(angle / sector))
    return radius * np.sin(angle), radius * np.cos(angle)


def _circle(x: Plane, y: Plane) -> Plane:
    return _disc(x, y, 0, 0, 0.92)


def _square(x: Plane, y: Plane) -> Plane:
    return _box(x, y, 0.76, 0.76)


def _triangle(x: Plane, y: Plane) -> Plane:
    return _polygon(x, y, [(0, 0.98), (-0.92, -0.66), (0.92, -0.66)])


def _diamond(x: Plane, y: Plane) -> Plane:
    # Much taller than wide, so that no rotation turns it into a square.
    width, height = 0.58, 1.0
    slope = math.hypot(width, height)
    nx, ny = np.float32(height / slope), np.float32(width / slope)
    return np.abs(x) * nx + np.abs(y) * ny - np.float32(width * height / slope)


def _star(x: Plane, y: Plane) -> Plane:
    px, py = _fold(x, y, 5)
    inner = 0.43
    notch = (inner * math.sin(math.pi / 5), inner * math.cos(math.pi / 5))
    return _line(px, py, notch, (0.0, 1.0))


def _heart(x: Plane, y: Plane) -> Plane:
    # Half a heart, mirrored: a lobe, and the wedge below it whose side is tangent to the lobe.
    px, lobe, radius, tip = np.abs(x), (0.44, 0.33), 0.48, (0.0, -0.92)
    reach = math.hypot(lobe[0] - tip[0], lobe[1] - tip[1])
    lean = math.atan2(lobe[0] - tip[0], lobe[1] - tip[1]) + math.asin(radius / reach)
    touch = math.sqrt(reach**2 - radius**2)
    side = (tip[0] + touch * math.sin(lean), tip[1] + touch * math.cos(lean))
    wedge = np.maximum(_line(px, y, tip, side), _line(px, y, side, (0.0, lobe[1] + 0.19)))
    return np.minimum(_disc(px, y, *lobe, radius), wedge)


def _cross(x: Plane, y: Plane) -> Plane:
    return np.minimum(_box(x, y, 0.94, 0.3), _box(x, y, 0.3, 0.94))


def _ring(x: Plane, y: Plane) -> Plane:
    distance: Plane = np.abs(_disc(x, y, 0, 0, 0.68)) - np.float32(0.27)
    return distance


def _crescent(x: Plane, y: Plane) -> Plane:
    return np.maximum(_disc(x, y, 0, 0, 0.95), -_disc(x, y, 0.5, 0.12, 0.72))


def _flower(x: Plane, y: Plane) -> Plane:
    px, py = _fold(x, y, 6)
    return np.minimum(_disc(px, py, 0, 0.66, 0.31), _disc(px, py, 0, 0, 0.5))


def _arrow(x: Plane, y: Plane) -> Plane:
    head = _polygon(x, y, [(0.98, 0), (0.02, 0.86), (0.02, -0.86)])
    shaft = _box(x + np.float32(0.42), y, 0.54, 0.33)
    return np.minimum(head, shaft)


def _drop(x: Plane, y: Plane) -> Plane:
    px, centre, radius, tip = np.abs(x), -0.32, 0.64, 1.0
    lean = math.asin(radius / (tip - centre))
    side = (radius * math.cos(lean), centre + radius * math.sin(lean))
    cone = np.maximum(_line(px, y, side, (0.0, tip)), np.float32(side[1]) - y)
    distance: Plane = np.minimum(_disc(px, y, 0, centre, radius), cone)
    return distance


SHAPES: dict[str, ShapeFunction] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "flower": _flower,
    "arrow": _arrow,
    "drop": _drop,
}


def coverage(distance: Plane, pixels: Plane | float) -> Plane:
    """Fraction of a pixel that lies inside, from a signed distance; `pixels` is pixels per unit."""
    share: Plane = np.clip(np.float32(0.5) - distance * pixels, 0, 1)
    return share


def _wave(x: Plane, period: float) -> Plane:
    """Signed distance to the edges of bands half a period wide; negative in the band around 0."""
    phase = x / np.float32(period)
    distance: Plane = (np.abs(phase - np.round(phase)) - np.float32(0.25)) * np.float32(period)
    return distance


def _plain(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    return np.zeros_like(x)


def _striped(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    return coverage(-_wave(x, 0.72 * scale), pixels)


def _dotted(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    cell = np.float32(0.6 * scale)
    px = x - cell * np.round(x / cell)
    py = y - cell * np.round(y / cell)
    return coverage(_disc(px, py, 0, 0, 0.34 * float(cell)), pixels)


def _checkered(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    quarter = np.float32(0.225 * scale)
    a, b = _wave(x + quarter, 0.9 * scale), _wave(y + quarter, 0.9 * scale)
    return coverage(np.maximum(np.minimum(a, b), -np.maximum(a, b)), pixels)


def _shaded(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    share: Plane = np.clip(np.float32(0.5) + x / np.float32(1.5 * scale), 0, 1)
    return share


def _halved(x: Plane, y: Plane, scale: float, pixels: Plane) -> Plane:
    return coverage(-x, pixels)


TEXTURES: dict[str, TextureFunction] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "shaded": _shaded,
    "halved": _halved,
}
