"""A procedural world of moving subjects: endless data with known truth, and no files.

A subject is a shape, a texture, and two exact colours. The caption can name a subject's looks or leave them
to the image; the exact colours, the texture's scale and its direction are never in the words, so that an
image prompt always carries more than any caption.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dit_booth.data.example import IdentityDict
from dit_booth.data.toyworld.looks import (
    COLOURS,
    Looks,
    Rgb,
    choose,
    exact_colour,
)
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES, Plane, coverage

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

    def poses(self, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return centre x, centre y, radius and angle at each `progress` in [0, 1] through the video, `f` each."""
        along, size = progress, np.ones_like(progress)
        match self.motion:
            case "bouncing":  # from the floor (`start`) to the top (`end`) and back, twice
                along = np.abs(np.sin(2 * math.pi * progress))
            case "growing":
                size = 0.65 + 0.55 * progress
            case "shrinking":
                size = 1.2 - 0.55 * progress
        centre_x = self.start[0] + (self.end[0] - self.start[0]) * along
        centre_y = self.start[1] + (self.end[1] - self.start[1]) * along
        return centre_x, centre_y, self.radius * size, self.angle + self.turn * progress


def caption(identity: Identity | IdentityDict, *, colours: bool, texture: bool) -> str:
    """Return the caption of a scene, with the subject's colours and its texture if asked for.

    "plain" is left out beside a colour: a single colour implies it.
    """
    it = _identity(identity)
    noun = noun_of(it, colours=colours, texture=texture)
    return f"{noun} {MOTIONS[it.motion]} {BACKGROUNDS[it.background][1]}"


def noun_of(it: Identity, *, colours: bool, texture: bool) -> str:
    """Return the subject as captions name it, with its article."""
    looks: list[str] = []
    if colours:
        looks.append(it.colours[0] if it.texture == "plain" else f"{it.colours[0]} and {it.colours[1]}")
    if texture and not (it.texture == "plain" and colours):
        looks.append(it.texture)
    noun = " ".join((*looks, it.shape))
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


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
    video, alpha = render_scene(_identity(identity), progress_of(frames), size)
    return torch.from_numpy(video * np.float32(2) - np.float32(1)), torch.from_numpy(alpha > 0.5)


def progress_of(frames: int) -> np.ndarray:
    """Return how far each frame is through a video of `frames` frames, in [0, 1]."""
    return np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)


def render_scene(it: Identity, progress: np.ndarray, size: int) -> tuple[Plane, Plane]:
    """Render subject and background at each `progress`: `f 3 h w` in [0, 1], and the subject's coverage `f h w`."""
    centre_x, centre_y, radius, angle = (_column(values) for values in it.poses(progress))
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    # Rows run down and the subject's y runs up.
    x, y = (grid[None, None, :] - centre_x) / radius, (centre_y - grid[None, :, None]) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    alpha, colour = paint(it, cos * x + sin * y, cos * y - sin * x, pixels=radius * np.float32(size))
    ground = _ground(it, size)
    return ground + (colour - ground) * rearrange(alpha, "f h w -> f 1 h w"), alpha


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
