"""Long scenes of the toy world: motion that reverses, a changing pose, drifting light, and a bar that passes in front.

A scene is the same at every number of frames, and its whole truth is known frame by frame (`truth_of`). The first and
the last quarter are free of the bar: there drift is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.data.example import Example, IdentityDict
from dit_booth.data.toyworld.looks import Looks, Rgb, choose
from dit_booth.data.toyworld.shapes import Plane, coverage
from dit_booth.data.toyworld.world import (
    BACKGROUNDS,
    Identity,
    noun_of,
    progress_of,
    render_prompt,
    render_scene,
    sample_identity,
)

PIECE = 32
"""Frames that are rendered at once."""

MOTIONS: dict[str, str] = {
    "back and forth": "is going back and forth",
    "up and down": "is going up and down",
    "to and fro": "is going to and fro on a slant",
    "swaying": "is swaying",
}
"""Motions of long scenes; all of them reverse."""
LIGHTS: dict[str, tuple[Rgb, Rgb, str]] = {
    "fading": ((1.0, 1.0, 1.0), (0.62, 0.62, 0.66), "in fading light"),
    "brightening": ((0.62, 0.62, 0.66), (1.0, 1.0, 1.0), "in growing light"),
    "warming": ((1.0, 1.0, 1.0), (1.0, 0.82, 0.62), "in ever warmer light"),
    "cooling": ((1.0, 1.0, 1.0), (0.66, 0.82, 1.0), "in ever colder light"),
}
"""Light -> gain of each channel in the first and the last frame (at most 1: nothing clips), and the caption's words."""


@dataclass(frozen=True, kw_only=True)
class LongIdentity(Identity):
    """All parameters of a long scene; those of `Identity` mean the same, but `turn` is the largest rotation.

    Attributes:
        trips: times that the subject goes from `start` to `end` and back.
        swings: times that it turns by `turn` to one side and to the other.
        swell: largest change of its radius, as a share.
        light: key of `LIGHTS`.
        bar_at, bar_takes: the middle of the bar's passage, and its duration, as shares of the video.
        bar_width: as a share of the side.
        bar_leftwards: it enters from the right.
        bar_rgb: its colour.
    """

    trips: float
    swings: float
    swell: float
    light: str
    bar_at: float
    bar_takes: float
    bar_width: float
    bar_leftwards: bool
    bar_rgb: Rgb

    def poses(self, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        along = 0.5 - 0.5 * np.cos(2 * math.pi * self.trips * progress)
        wave = np.sin(2 * math.pi * self.swings * progress)
        centre_x = self.start[0] + (self.end[0] - self.start[0]) * along
        centre_y = self.start[1] + (self.end[1] - self.start[1]) * along
        return centre_x, centre_y, self.radius * (1 + self.swell * wave), self.angle + self.turn * wave

    def gains(self, progress: np.ndarray) -> NDArray[np.float32]:
        """Return the light's gain of every channel at each `progress`, `f 3`."""
        first, last, _ = LIGHTS[self.light]
        return np.asarray(np.outer(1 - progress, first) + np.outer(progress, last), np.float32)

    def bar_centres(self, progress: np.ndarray) -> np.ndarray:
        """Return the bar's centre, x in shares of the side, at each `progress`; in view from -w/2 to 1 + w/2."""
        passed = (progress - self.bar_at) / self.bar_takes + 0.5
        x = (1 + self.bar_width) * passed - self.bar_width / 2
        return 1 - x if self.bar_leftwards else x

    def has_bar(self, progress: np.ndarray) -> NDArray[np.bool_]:
        """Return where the bar is in the frame, `f`."""
        return np.asarray(np.abs(progress - self.bar_at) < self.bar_takes / 2)


class Truth(NamedTuple):
    """The truth of every frame of a long scene."""

    mask: NDArray[np.bool_]  # f h w, the subject as far as it is seen
    visible: NDArray[np.float64]  # f, share of the subject in the frame that the bar does not hide
    poses: NDArray[
        np.float64
    ]  # f 4: centre x (right) and y (down), radius in shares of the side, angle in radians
    rgb: NDArray[np.float64]  # f 2 3, the subject's two colours under the light, in [0, 1]


def is_long(identity: IdentityDict | None) -> bool:
    """Return True for the parameters of a long scene."""
    return identity is not None and "trips" in identity


def as_identity(identity: Identity | IdentityDict) -> Identity:
    """Return the parameters of a scene, short or long, from their mapping. TypeError: they are not those of one."""
    if isinstance(identity, Identity):
        return identity
    kind = LongIdentity if is_long(identity) else Identity
    return kind(**identity)


def sample_long_identity(rng: np.random.Generator, looks: Looks) -> LongIdentity:
    """Draw a subject with these looks, its pose in the image prompt, and a long scene for it."""
    short = sample_identity(rng, looks)
    motion = choose(rng, list(MOTIONS))
    radius = float(rng.uniform(0.26, 0.33))
    swell = float(rng.uniform(0.08, 0.18))
    low, high = radius * (1 + swell), 1 - radius * (1 + swell)
    middle = float(rng.uniform(low, high))
    start, end = {
        "back and forth": ((low, middle), (high, middle)),
        "up and down": ((middle, low), (middle, high)),
        "to and fro": ((low, high), (high, low)),
        "swaying": ((0.5 - 0.3 * (0.5 - low), middle), (0.5 + 0.3 * (0.5 - low), middle)),
    }[motion]
    if rng.random() < 0.5:
        start, end = end, start
    unturned = looks[1] == "plain" and looks[0] in ("circle", "ring")
    turn = math.radians(rng.uniform(40, 120)) * float(rng.choice((-1.0, 1.0)))
    values: dict[str, Any] = {field.name: getattr(short, field.name) for field in fields(short)}
    changed = {
        "motion": motion,
        "radius": radius,
        "start": start,
        "end": end,
        "turn": 0.0 if unturned else turn,
    }
    takes = float(rng.uniform(0.14, 0.22))
    dark = float(rng.uniform(0.25, 0.4))
    return LongIdentity(
        **{**values, **changed},
        trips=float(rng.uniform(2.0, 4.0)),
        swings=float(rng.uniform(1.5, 3.0)),
        swell=swell,
        light=choose(rng, list(LIGHTS)),
        bar_at=float(rng.uniform(0.28 + takes / 2, 0.72 - takes / 2)),
        bar_takes=takes,
        bar_width=float(rng.uniform(0.18, 0.28)),
        bar_leftwards=bool(rng.random() < 0.5),
        bar_rgb=(dark, dark * 1.02, dark * 1.08),
    )


def long_caption(identity: LongIdentity, *, colours: bool, texture: bool) -> str:
    """Return the caption of a long scene: no other scene has its words."""
    noun = noun_of(identity, colours=colours, texture=texture)
    light, ground = LIGHTS[identity.light][2], BACKGROUNDS[identity.background][1]
    return f"{noun} {MOTIONS[identity.motion]} {ground} {light}, and a bar passes"


def render_pieces(
    identity: LongIdentity, *, frames: int, size: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float64]]]:
    """Render a long scene `PIECE` frames at a time, so that memory does not grow with the video.

    Yields: frames `f 3 h w` in [0, 1], the visible subject's mask `f h w`, and its visible share `f`.
    """
    progress = progress_of(frames)
    for at in range(0, frames, PIECE):
        yield _render(identity, progress[at : at + PIECE], size)


def _render(
    it: LongIdentity, progress: np.ndarray, size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float64]]:
    picture, alpha = render_scene(it, progress, size)
    grid = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    centre = it.bar_centres(progress).astype(np.float32)
    beside = np.abs(grid[None, :] - centre[:, None]) - np.float32(it.bar_width / 2)
    bar: Plane = rearrange(coverage(beside, size), "f w -> f 1 w")
    colour = rearrange(np.asarray(it.bar_rgb, np.float32), "c -> 1 c 1 1")
    picture = picture + (colour - picture) * rearrange(bar, "f h w -> f 1 h w")
    picture = picture * rearrange(it.gains(progress), "f c -> f c 1 1")
    seen = alpha * (1 - bar)
    share = seen.sum(axis=(1, 2), dtype=np.float64) / np.maximum(
        alpha.sum(axis=(1, 2), dtype=np.float64), 1e-9
    )
    return np.asarray(picture, np.float32), seen > 0.5, share


def render_long(identity: LongIdentity, *, frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Render a long scene: the video, `f 3 h w` float32 in [-1, 1], and the visible subject's mask, `f h w` bool."""
    video, mask = torch.empty(frames, 3, size, size), torch.empty(frames, size, size, dtype=torch.bool)
    for at, (picture, seen, _) in zip(
        range(0, frames, PIECE), render_pieces(identity, frames=frames, size=size), strict=True
    ):
        video[at : at + PIECE] = torch.from_numpy(picture * np.float32(2) - np.float32(1))
        mask[at : at + PIECE] = torch.from_numpy(seen)
    return video, mask


def truth_of(identity: LongIdentity, *, frames: int, size: int) -> Truth:
    """Return the truth of every frame: mask, visible share, pose, and colours under the light."""
    progress = progress_of(frames)
    pieces = [piece[1:] for piece in render_pieces(identity, frames=frames, size=size)]
    mask, visible = (np.concatenate(each) for each in zip(*pieces, strict=True))
    gains = rearrange(identity.gains(progress).astype(np.float64), "f c -> f 1 c")
    return Truth(mask, visible, np.stack(identity.poses(progress), axis=1), gains * np.asarray(identity.rgb))


def under_white_light(video: Tensor, identity: LongIdentity) -> Tensor:
    """Return a video `f 3 h w` in [-1, 1] as it would be under white light, if its light were the scene's."""
    gains = torch.from_numpy(identity.gains(progress_of(len(video)))).to(video)
    return ((video + 1) / rearrange(gains, "f c -> f c 1 1") - 1).clamp(-1, 1)


def long_example(
    identity: LongIdentity, key: str, named: tuple[bool, bool], *, frames: int, size: int, image_size: int
) -> Example:
    """Return a long scene as an example; `named`: whether the caption has the subject's colours, and its texture."""
    video, mask = render_long(identity, frames=frames, size=size)
    return Example(
        key=key,
        video=video,
        caption=long_caption(identity, colours=named[0], texture=named[1]),
        subject=identity.shape,
        image=render_prompt(identity, size=image_size),
        mask=mask,
        mask_frames=frames,
        identity={field.name: getattr(identity, field.name) for field in fields(identity)},
    )
