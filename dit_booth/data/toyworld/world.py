"""A procedural world of moving subjects: endless data with known truth, and no files.

A subject is a shape, a texture, and two exact colours. The caption can name a subject's looks or leave them
to the image; the exact colours, the texture's scale and its direction are never in the words, so that an
image prompt always carries more than any caption. Every example is a pure function of `(seed, split, index)`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dit_booth.data.example import Example, IdentityDict
from dit_booth.data.toyworld.looks import (
    COLOURS,
    Looks,
    Rgb,
    Split,
    choose,
    draw_looks,
    exact_colour,
)
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES, Plane, coverage

Describe = Literal["none", "full", "mixed"]

# Smallest distance in RGB between a subject and its background.
BACKGROUND_CONTRAST = 0.5

BACKGROUNDS: dict[str, tuple[Rgb, str]] = {
    "sand": ((0.91, 0.82, 0.63), "on sand"),
    "snow": ((0.94, 0.95, 0.98), "on snow"),
    "grass": ((0.62, 0.80, 0.49), "on grass"),
    "sky": ((0.66, 0.85, 0.97), "in the sky"),
    "stone": ((0.68, 0.68, 0.70), "on stone"),
    "night": ((0.10, 0.11, 0.24), "at night"),
}

MOTIONS: dict[str, str] = {
    "left": "is moving left",
    "right": "is moving right",
    "up": "is moving up",
    "down": "is moving down",
    "spinning": "is spinning",
    "growing": "is growing",
    "shrinking": "is shrinking",
    "bouncing": "is bouncing",
    "still": "is resting",
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All parameters that an example is rendered from.

    Lengths are shares of the frame's side, angles are radians counter-clockwise, colours are RGB in [0, 1].

    Attributes:
        shape, texture: keys of `SHAPES` and `TEXTURES`.
        colours: the names of the two colours; a plain subject has the same name twice.
        rgb: the two exact colours.
        scale, direction: the texture's size relative to its usual one, and its angle to the subject.
        motion, background: keys of `MOTIONS` and `BACKGROUNDS`.
        radius, angle: the subject's usual radius (of the circle around it) and rotation in the video.
        start, end: the subject's centre at the first and the last frame (x right, y down, from the top left).
        turn: rotation over the whole video.
        ripples: three plane waves of the background's soft texture: (cycles in x, cycles in y, phase).
        prompt_angle, prompt_flip: the subject's pose in the image prompt.
    """

    shape: str
    texture: str
    colours: tuple[str, str]
    rgb: tuple[Rgb, Rgb]
    scale: float
    direction: float
    motion: str
    background: str
    radius: float
    angle: float
    start: tuple[float, float]
    end: tuple[float, float]
    turn: float
    ripples: tuple[Rgb, ...]
    prompt_angle: float
    prompt_flip: bool


@dataclass(frozen=True, kw_only=True)
class ToyworldConfig:
    """The toy world's options.

    Attributes:
        frames: frames per video.
        size: side of the square video in pixels.
        image_size: side of the image prompt in pixels; None: that of the video.
        seed: seed of all examples.
        split: `train`, `dev` or `test`: disjoint combinations of shape, texture and colours (`looks.split_of`).
        length: number of examples; index `i` is the same example at every length.
        describe: looks of the subject in the caption: `none`, `full`, or `mixed` (colours and
            texture are each named with probability `describe_probability`).
        describe_probability: see `describe`.
    """

    frames: int = 8
    size: int = 32
    image_size: int | None = None
    seed: int = 0
    split: Split = "train"
    length: int = 1_000_000
    describe: Describe = "none"
    describe_probability: float = 0.5

    def __post_init__(self) -> None:
        image_size = self.size if self.image_size is None else self.image_size
        bounds = (("frames", self.frames, 1), ("size", self.size, 8), ("image_size", image_size, 8))
        for name, value, low in (*bounds, ("seed", self.seed, 0), ("length", self.length, 1)):
            if value < low:
                raise ValueError(f"data.{name} is {value}; it must be at least {low}")
        words = (("split", self.split, Split), ("toyworld.describe", self.describe, Describe))
        for name, word, choices in words:
            if word not in get_args(choices):
                raise ValueError(f"data.{name} is {word!r}; choose one of {', '.join(get_args(choices))}")
        if not 0 <= self.describe_probability <= 1:
            raise ValueError(
                f"data.toyworld.describe_probability is {self.describe_probability}; it must be in [0, 1]"
            )


class Toyworld:
    """The toy world as a data set of `Example`s."""

    def __init__(self, config: ToyworldConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> Example:
        """Example `index`, a pure function of `(seed, split, index)` and the sizes.

        Raises:
            IndexError: `index` is not in [0, length).
        """
        config = self.config
        if not 0 <= index < config.length:
            raise IndexError(f"index is {index}; the toy world holds 0 to {config.length - 1} (data.length)")
        rng = np.random.default_rng((config.seed, get_args(Split).index(config.split), index))
        # Drawn first and always, so that the caption's options never change the scene.
        named = (
            rng.random(2) < {"none": 0.0, "full": 1.0, "mixed": config.describe_probability}[config.describe]
        )
        identity = sample_identity(rng, draw_looks(rng, config.split, index))
        video, mask = render_video(identity, frames=config.frames, size=config.size)
        return Example(
            key=f"toyworld/{config.seed}/{config.split}/{index}",
            video=video,
            caption=caption(identity, colours=bool(named[0]), texture=bool(named[1])),
            subject=identity.shape,
            image=render_prompt(identity, size=config.image_size or config.size),
            mask=mask,
            mask_frames=config.frames,
            identity=asdict(identity),
        )


def caption(identity: Identity | IdentityDict, *, colours: bool, texture: bool) -> str:
    """Return the caption of a scene, with the subject's colours and its texture if asked for.

    "plain" is left out beside a colour: a single colour implies it.
    """
    it = _identity(identity)
    looks: list[str] = []
    if colours:
        looks.append(it.colours[0] if it.texture == "plain" else f"{it.colours[0]} and {it.colours[1]}")
    if texture and not (it.texture == "plain" and colours):
        looks.append(it.texture)
    noun = " ".join((*looks, it.shape))
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article} {noun} {MOTIONS[it.motion]} {BACKGROUNDS[it.background][1]}"


def sample_identity(rng: np.random.Generator, looks: Looks) -> Identity:
    """Draw a subject with these looks, a scene for it, and its pose in the image prompt."""
    shape, texture, colours = looks
    rgb = (exact_colour(rng, colours[0]), exact_colour(rng, colours[1]))
    if texture == "plain":
        rgb = (rgb[0], rgb[0])
    visible = [
        name
        for name, (pale, _) in BACKGROUNDS.items()
        if min(math.dist(pale, COLOURS[colour]) for colour in colours) >= BACKGROUND_CONTRAST
    ]
    # A plain disc or ring that spins looks as if at rest, and would contradict the caption.
    unmoved = texture == "plain" and shape in ("circle", "ring")
    motion = choose(rng, [name for name in MOTIONS if not (unmoved and name == "spinning")])
    radius, start, end = _path(rng, motion)
    # 6 to 13 degrees between frames of an eight-frame video; beyond, a star's arms are ambiguous.
    turn = math.radians(rng.uniform(45, 90)) * float(rng.choice((-1.0, 1.0)))
    return Identity(
        shape=shape,
        texture=texture,
        colours=colours,
        rgb=rgb,
        scale=float(rng.uniform(0.85, 1.25)),
        direction=math.radians(float(rng.choice((0.0, 45.0, 90.0)))),
        motion=motion,
        background=choose(rng, visible),
        radius=radius,
        angle=math.radians(rng.uniform(-12, 12)),
        start=start,
        end=end,
        turn=turn if motion == "spinning" else 0.0,
        ripples=tuple(
            (float(rng.uniform(-2.5, 2.5)), float(rng.uniform(-2.5, 2.5)), float(rng.uniform(0, 2 * math.pi)))
            for _ in range(3)
        ),
        prompt_angle=math.radians(rng.uniform(-30, 30)),
        prompt_flip=bool(rng.random() < 0.5),
    )


def another_scene(identity: Identity | IdentityDict, seed: int = 0) -> Identity:
    """Return the same subject (shape, exact colours, texture's scale and direction) in another motion and place."""
    it = _identity(identity)
    digest = hashlib.sha256(repr(it).encode()).digest()
    rng = np.random.default_rng((seed, int.from_bytes(digest[:7])))
    while True:
        other = sample_identity(rng, (it.shape, it.texture, it.colours))
        if other.motion != it.motion and other.background != it.background:
            return replace(other, rgb=it.rgb, scale=it.scale, direction=it.direction)


def render_video(identity: Identity | IdentityDict, *, frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Render the scene in motion.

    Returns:
        The video, `f 3 h w` float32 in [-1, 1], and the subject's mask, `f h w` bool.
    """
    it = _identity(identity)
    progress = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    centre_x, centre_y, radius, angle = (_column(values) for values in _poses(it, progress))
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    # Rows run down and the subject's y runs up.
    x, y = (grid[None, None, :] - centre_x) / radius, (centre_y - grid[None, :, None]) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    alpha, colour = paint(it, cos * x + sin * y, cos * y - sin * x, pixels=radius * np.float32(size))
    ground = _ground(it, size)
    video = ground + (colour - ground) * rearrange(alpha, "f h w -> f 1 h w")
    return torch.from_numpy(video * np.float32(2) - np.float32(1)), torch.from_numpy(alpha > 0.5)


def render_prompt(identity: Identity | IdentityDict, *, size: int) -> Tensor:
    """Render the subject alone on white, in the pose of the image prompt, cropped to its box and padded to a square.

    Returns:
        `3 s s` float32 in [-1, 1].
    """
    it = _identity(identity)
    coarse = np.linspace(-1.05, 1.05, 64, dtype=np.float32)
    inside = SHAPES[it.shape](*_prompt_pose(it, coarse[None, None, :], -coarse[None, :, None]))[0] < 0
    columns, rows = coarse[inside.any(axis=0)], coarse[inside.any(axis=1)]
    half = np.float32(max(columns[-1] - columns[0], rows[-1] - rows[0]) / 2 + (coarse[1] - coarse[0]) / 2)
    grid = half * (
        (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / size) - np.float32(1)
    )
    x = grid[None, None, :] + (columns[-1] + columns[0]) / np.float32(2)
    y = -grid[None, :, None] - (rows[-1] + rows[0]) / np.float32(2)
    alpha, colour = paint(it, *_prompt_pose(it, x, y), pixels=_column(np.array([size / (2 * half)])))
    image = 1 + (colour - 1) * rearrange(alpha, "f h w -> f 1 h w")
    return torch.from_numpy(image[0] * np.float32(2) - np.float32(1))


def _identity(identity: Identity | IdentityDict) -> Identity:
    return identity if isinstance(identity, Identity) else Identity(**identity)


def _column(values: np.ndarray) -> Plane:
    return rearrange(np.asarray(values, dtype=np.float32), "f -> f 1 1")


def _path(rng: np.random.Generator, motion: str) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Draw radius, first centre and last centre; the subject stays (almost) inside the frame."""
    moving = motion in ("left", "right", "up", "down", "bouncing")
    radius = float(rng.uniform(0.3, 0.36) if moving else rng.uniform(0.34, 0.42))
    near, slack = 0.9 * radius, 0.5 - radius
    across = 0.5 + float(rng.uniform(-slack, slack)) * 0.8
    other = 0.5 + float(rng.uniform(-slack, slack)) * 0.8
    travel = (1 - 2 * near) * float(rng.uniform(0.85, 1.0))
    low, high = 0.5 - travel / 2, 0.5 + travel / 2
    match motion:
        case "right":
            return radius, (low, across), (high, across)
        case "left":
            return radius, (high, across), (low, across)
        case "down":
            return radius, (across, low), (across, high)
        case "up":
            return radius, (across, high), (across, low)
        case "bouncing":
            return radius, (across, high), (across, low)
        case "growing" | "shrinking":
            return radius, (0.5, 0.5), (0.5, 0.5)
        case _:
            return radius, (across, other), (across, other)


def _poses(it: Identity, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y, radius and angle at each `progress` in [0, 1] through the video; each of shape `f`."""
    along, size = progress, np.ones_like(progress)
    match it.motion:
        case "bouncing":  # from the floor (`start`) to the top (`end`) and back, twice
            along = np.abs(np.sin(2 * math.pi * progress))
        case "growing":
            size = 0.65 + 0.55 * progress
        case "shrinking":
            size = 1.2 - 0.55 * progress
    centre_x = it.start[0] + (it.end[0] - it.start[0]) * along
    centre_y = it.start[1] + (it.end[1] - it.start[1]) * along
    return centre_x, centre_y, it.radius * size, it.angle + it.turn * progress


def _prompt_pose(it: Identity, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    cos, sin = np.float32(math.cos(it.prompt_angle)), np.float32(math.sin(it.prompt_angle))
    px, py = cos * x + sin * y, cos * y - sin * x
    return (-px if it.prompt_flip else px), py


def paint(it: Identity, x: Plane, y: Plane, *, pixels: Plane) -> tuple[Plane, Plane]:
    """Return coverage `f h w` and colour `f 3 h w` of the subject at its own coordinates `x`, `y` (`f h w`).

    `pixels` is pixels per radius, `f 1 1`: it sets the width of the anti-aliased outlines.
    """
    alpha = coverage(SHAPES[it.shape](x, y), pixels)
    first, second = (rearrange(np.asarray(rgb, dtype=np.float32), "c -> 1 c 1 1") for rgb in it.rgb)
    cos, sin = np.float32(math.cos(it.direction)), np.float32(math.sin(it.direction))
    share = TEXTURES[it.texture](cos * x + sin * y, cos * y - sin * x, it.scale, pixels)
    return alpha, first + (second - first) * rearrange(share, "f h w -> f 1 h w")


def _ground(it: Identity, size: int) -> Plane:
    """The background, `3 h w`: its colour, lighter at the top, with a faint texture."""
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    light = np.broadcast_to(np.float32(0.04) - np.float32(0.08) * grid[:, None], (size, size)).copy()
    for cycles_x, cycles_y, phase in it.ripples:
        wave = np.float32(cycles_x) * grid[None, :] + np.float32(cycles_y) * grid[:, None]
        light += np.float32(0.012) * np.sin(np.float32(2 * math.pi) * wave + np.float32(phase))
    pale = rearrange(np.asarray(BACKGROUNDS[it.background][0], dtype=np.float32), "c -> c 1 1")
    return np.clip(pale + light, 0, 1)
