"""Looks of the toy world's subjects: combinations of shape, texture and colour names, and their three splits.

train   all that the embedded networks were trained on: nine in ten ordered combinations, by a hash
test    combinations of which `train` has neither order of the colours: for published numbers
dev     the others that `train` never shows, some with their colours swapped in `train`: settings are chosen on them
"""

from __future__ import annotations

import hashlib
import math
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np

from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES

Rgb = tuple[float, float, float]
Split = Literal["train", "dev", "test"]
Looks = tuple[str, str, tuple[str, str]]
"""Shape, texture and the names of the two colours; a plain subject has the same name twice."""

COLOURS: dict[str, Rgb] = {
    "red": (0.87, 0.13, 0.14),
    "orange": (0.97, 0.53, 0.09),
    "yellow": (0.97, 0.86, 0.16),
    "green": (0.14, 0.60, 0.20),
    "teal": (0.10, 0.72, 0.70),
    "blue": (0.14, 0.30, 0.86),
    "purple": (0.53, 0.16, 0.70),
    "pink": (0.96, 0.52, 0.72),
    "brown": (0.47, 0.27, 0.13),
    "black": (0.09, 0.09, 0.10),
}
# Half of the smallest gap between two names is 0.16; a jitter of 0.08 a channel moves a colour by at most
# 0.14, so the nearest name is always the right one.
COLOUR_JITTER = 0.08
# Smallest distance in RGB between the two colours of a subject.
COLOUR_CONTRAST = 0.45

_HELDOUT_SHARE = 10  # one in 10 ordered combinations is not in `train`
_DEV_BY_USE: tuple[Looks, ...] = (
    ("triangle", "plain", ("orange", "orange")),
    ("circle", "plain", ("yellow", "yellow")),
    ("crescent", "plain", ("orange", "orange")),
    ("flower", "plain", ("brown", "brown")),
)
"""Looks that the hash would put into `test`, but the first twelve dev prompts show: settings were chosen on them."""


def split_of(looks: Looks) -> Split:
    """Return the split of a combination, whatever the seed."""
    if not _heldout(looks):
        return "train"
    shape, texture, (first, second) = looks
    neither = _heldout((shape, texture, (second, first)))
    return "test" if neither and looks not in _DEV_BY_USE else "dev"


@cache
def looks_of_test() -> tuple[Looks, ...]:
    """Return the combinations of `test`, each in one order of its colours, in the order of a hash."""
    pairs = [pair for pair in combinations(COLOURS, 2) if contrasting(*pair)]
    every = [
        (shape, texture, colours)
        for shape in SHAPES
        for texture in TEXTURES
        for colours in ([(name, name) for name in COLOURS] if texture == "plain" else pairs)
    ]
    return tuple(sorted((looks for looks in every if split_of(looks) == "test"), key=_digest))


def draw_looks(rng: np.random.Generator, split: Split, index: int) -> Looks:
    """Draw the looks of example `index`: in `test` all combinations in turn, elsewhere one at random."""
    if split == "test":
        every = looks_of_test()
        shape, texture, (first, second) = every[index % len(every)]
        return shape, texture, (first, second) if rng.random() < 0.5 else (second, first)
    while True:
        shape, texture = choose(rng, list(SHAPES)), choose(rng, list(TEXTURES))
        first, second = choose(rng, list(COLOURS)), choose(rng, list(COLOURS))
        if texture == "plain":
            second = first
        elif not contrasting(first, second):
            continue
        looks = shape, texture, (first, second)
        if split_of(looks) == split:
            return looks


def contrasting(first: str, second: str) -> bool:
    """Return True if two colours are far enough apart for one subject."""
    return math.dist(COLOURS[first], COLOURS[second]) >= COLOUR_CONTRAST


def exact_colour(rng: np.random.Generator, name: str) -> Rgb:
    """Draw an exact colour of a name."""
    red, green, blue = np.clip(np.add(COLOURS[name], rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3)), 0, 1)
    return float(red), float(green), float(blue)


def choose(rng: np.random.Generator, names: list[str]) -> str:
    """Draw one of the names."""
    return names[int(rng.integers(len(names)))]


def _heldout(looks: Looks) -> bool:
    return _digest(looks) % _HELDOUT_SHARE == 0


def _digest(looks: Looks) -> int:
    shape, texture, colours = looks
    return int.from_bytes(
        hashlib.blake2b("/".join((shape, texture, *colours)).encode(), digest_size=8).digest(), "big"
    )
