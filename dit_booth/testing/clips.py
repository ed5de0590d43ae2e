"""Videos of toy-world subjects with planted defects and their true masks, to test a build's filters on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import cv2
import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from dit_booth.data.build.segment import write_mask
from dit_booth.data.image_files import Mask
from dit_booth.data.image_prompt import pixel_box
from dit_booth.data.toyworld import Identity, Toyworld, ToyworldConfig
from dit_booth.data.toyworld.world import paint
from dit_booth.data.video import write_video

Defect = Literal[
    "none",
    "small",
    "large",
    "border",
    "still",
    "no motion",
    "cut",
    "blurred",
    "too short",
    "duplicate",
    "watermark",
    "no mask",
    "unreadable",
]
"""A plant's name is the reason by which the build should reject it."""
DEFECTS: tuple[Defect, ...] = get_args(Defect)
Frames = NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """A video, `f h w 3` in [0, 1], the mask of its first frame, its caption and subject, and what is wrong with it."""

    name: str
    frames: Frames
    mask: Mask
    caption: str
    subject: str
    defect: Defect


def make_clip(number: int, defect: Defect, *, frames: int, size: tuple[int, int]) -> Clip:
    """Draw a subject that moves over a ground under a panning camera, a pure function of the arguments.

    A duplicate shows clip 0 (of the same size), a little brighter.
    """
    rng = np.random.default_rng((7, 0 if defect == "duplicate" else number))
    look = Toyworld(ToyworldConfig(size=8, frames=1))[number if defect != "duplicate" else 0]
    assert look.identity is not None
    identity = Identity(**look.identity)
    if defect == "large":  # other shapes leave most of the frame free
        identity = replace(identity, shape="square")
    scene, mask = render(identity, rng, defect, frames, size)
    if defect == "cut":
        other = np.random.default_rng((8, number))
        second, _ = render(identity, other, defect, frames, size)
        scene = np.concatenate([scene[: frames // 2], 1 - second[frames // 2 :]])
    if defect == "still":
        scene = np.repeat(scene[:1], frames, axis=0)
    if defect == "too short":
        scene = scene[: frames // 2]
    if defect == "blurred":
        scene = np.stack([cv2.GaussianBlur(frame, (0, 0), max(size) / 40) for frame in scene])
    if defect == "watermark":
        mark = watermark(size)
        scene = scene * (1 - 0.35 * mark) + 0.35 * mark
    if defect == "duplicate":
        scene = scene * 0.97 + 0.02
    caption = f"a {look.subject} is moving on the ground"
    return Clip(f"clip{number}", scene.astype(np.float32), mask, caption, look.subject, defect)


def render(
    identity: Identity, rng: np.random.Generator, defect: Defect, frames: int, size: tuple[int, int]
) -> tuple[Frames, Mask]:
    """Draw the scene; return its frames, `f h w 3`, and the mask of the first.

    The subject travels relative to the ground, which the camera pans over; that with "no motion" moves with it.
    """
    height, width = size
    ranges = {"small": (0.028, 0.045), "large": (0.75, 0.9)}
    radius = float(rng.uniform(*ranges.get(defect, (0.12, 0.25)))) * width
    angle, distance = float(rng.uniform(0, 2 * np.pi)), float(rng.uniform(0.15, 0.3)) * width
    travel = np.array([np.cos(angle), np.sin(angle)]) * distance
    pan = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.1, 0.1)]) * width
    travel = pan if defect == "no motion" else pan + travel
    steps = np.linspace(-0.5, 0.5, frames)[:, None]
    centre = np.array([width / 2, height / 2]) + steps * travel
    if defect == "border":
        # Its first frame lies in a corner, cut by two sides.
        corner = rng.integers(0, 2, 2) * np.array([width, height])
        inward = np.sign(np.array([width, height]) / 2 - corner)
        centre = corner + inward * (0.5 * radius + (steps + 0.5) * distance)
    y, x = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    across = (x - centre[:, 0, None, None]) / radius
    up = (centre[:, 1, None, None] - y) / radius
    pixels = np.full((frames, 1, 1), radius, np.float32)
    alpha, colour = paint(identity, across.astype(np.float32), up.astype(np.float32), pixels=pixels)
    ground = panned(rng, (steps + 0.5) * pan, size)
    share = rearrange(alpha, "f h w -> f h w 1")
    scene = ground + (rearrange(colour, "f c h w -> f h w c") - ground) * share
    return scene.astype(np.float32), alpha[0] > 0.5


def panned(rng: np.random.Generator, shifts: NDArray[np.float64], size: tuple[int, int]) -> Frames:
    """Return a textured ground, moved by shifts (`f 2`, x and y, in pixels): `f h w 3`."""
    height, width = size
    margin = int(np.ceil(np.abs(shifts).max())) + 2
    whole = height + 2 * margin, width + 2 * margin
    fine = [
        cv2.resize(rng.random((n, n, 3), np.float32), whole[::-1], interpolation=cv2.INTER_CUBIC)
        for n in (6, 40)
    ]
    texture = np.clip(0.45 + 0.3 * (fine[0] - 0.5) + 0.3 * (fine[1] - 0.5), 0, 1).astype(np.float32)
    moves = [np.array([[1, 0, dx - margin], [0, 1, dy - margin]], np.float32) for dx, dy in shifts]
    return np.stack([cv2.warpAffine(texture, move, (width, height)) for move in moves]).astype(np.float32)


def watermark(size: tuple[int, int]) -> Frames:
    """Return the picture of a watermark in the middle of a frame, `h w 1` in [0, 1]."""
    height, width = size
    canvas: NDArray[np.uint8] = np.zeros((height, width), np.uint8)
    scale, thickness = width / 320, max(1, round(width / 160))
    place = (round(0.12 * width), round(0.55 * height))
    cv2.putText(canvas, "sample stock", place, cv2.FONT_HERSHEY_SIMPLEX, scale * 1.1, 255, thickness)
    return rearrange((canvas / 255).astype(np.float32), "h w -> h w 1")


def watermark_picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the watermark alone, cropped to its box, `h w 3`, as a user would save it."""
    mark = watermark(size)[..., 0]
    rows, columns = np.flatnonzero(mark.any(axis=1)), np.flatnonzero(mark.any(axis=0))
    part = mark[rows[0] - 2 : rows[-1] + 3, columns[0] - 2 : columns[-1] + 3]
    return np.repeat((part * 255).astype(np.uint8)[..., None], 3, axis=2)


def write_clip(
    number: int, defect: Defect, root: Path, *, frames: int, size: tuple[int, int], fps: float
) -> str:
    """Draw a clip, and write its video and mask below `root` as in VideoBooth's format; return its line of captions."""
    clip = make_clip(number, defect, frames=frames, size=size)
    path = root / "videos" / f"{clip.name}.mp4"
    write_video(path, rearrange(torch.from_numpy(clip.frames) * 2 - 1, "f h w c -> f c h w"), fps=fps)
    if defect == "unreadable":
        path.write_bytes(path.read_bytes()[:-2000])
    height, width = size
    box = pixel_box(None, clip.mask, height=height, width=width)
    folder = root / "masks" / clip.name
    write_mask(folder / "mask_1.png", clip.mask)
    label = "cloud" if defect == "no mask" else clip.subject
    entry = {"value": 1, "label": label, "logit": 1.0, "box": box}
    (folder / "mask.json").write_text(json.dumps([{"value": 0, "label": "background"}, entry]))
    return f"{clip.name}.mp4,{clip.caption}\n"


def write_clips(
    plan: Sequence[Defect], root: Path, *, frames: int, size: tuple[int, int], fps: float, workers: int = 1
) -> None:
    """Write a clip for each planned defect, ``captions.csv`` and ``watermark.png``."""
    work = partial(write_clip, root=root, frames=frames, size=size, fps=fps)
    if workers == 1:
        lines = list(map(work, range(len(plan)), plan))
    else:
        with ProcessPoolExecutor(workers) as pool:
            lines = list(pool.map(work, range(len(plan)), plan, chunksize=4))
    (root / "captions.csv").write_text("".join(["video,caption\n", *lines]))
    cv2.imwrite(str(root / "watermark.png"), watermark_picture(size))
