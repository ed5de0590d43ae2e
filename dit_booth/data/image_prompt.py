"""The image prompt: a subject cut out on white, cropped to its box, padded to a square (as in VideoBooth).

On disk a subject is a folder with `image.jpg`, and, to cut it out, `mask.json` and `mask_<value>.png`.
`mask.json` is a list of `{"value", "label", "logit", "box"}`, as Grounded-SAM writes it; value 0 is the
background, and a box is `[x0, y0, x1, y1]` in pixels of the image.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How an image prompt is varied in training, so that the model learns the subject and not its pose.

    Attributes:
        flip: mirror half of the images.
        degrees: rotate by an angle from [-degrees, degrees], with white in the corners.
        trim: cut one side of the box by a share from [0.01, trim]; 0 cuts nothing (VideoBooth's second stage:
            0.2).
    """

    flip: bool = True
    degrees: float = 30.0
    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"augment.degrees is {self.degrees}; it must be in [0, 180]")
        if self.trim != 0 and not 0.01 <= self.trim < 1:
            raise ValueError(f"augment.trim is {self.trim}; it must be 0 (off) or in [0.01, 1)")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One subject of a `mask.json`: the value in its mask's file name, its word, its score, and its box."""

    value: int
    label: str
    logit: float
    box: Box


def load_image_prompt(
    source: str | Path, *, size: int, augment: Augment | None = None, rng: np.random.Generator | None = None
) -> Tensor:
    """Read an image prompt from an image file, or from a folder with `image.jpg` and perhaps a mask.

    With a mask the subject (the entry with the highest logit) is cut out; without one the image is taken as
    it is and padded to a square with white. Variation needs both `augment` and `rng`.

    Returns:
        `3 s s` float32 in [-1, 1].

    Raises:
        ValueError: nothing is there, the image is not RGB, or the mask does not fit it.
    """
    source = Path(source)
    if not source.is_dir():
        return prepare(read_rgb(source), size=size, augment=augment, rng=rng)
    files = [source / name for name in ("image.jpg", "image.jpeg", "image.png") if (source / name).is_file()]
    if len(files) != 1:
        names = [file.name for file in files]
        raise ValueError(f"{source}: has {names or 'no image'}; it must hold one image, named image.jpg")
    image = read_rgb(files[0])
    if not (source / "mask.json").is_file():
        if stray := sorted(file.name for file in source.glob("mask_*.png")):
            raise ValueError(f"{source}: has {stray} and no mask.json; add mask.json, or remove the masks")
        return prepare(image, size=size, augment=augment, rng=rng)
    entry = max(read_entries(source / "mask.json"), key=lambda entry: entry.logit)
    mask = read_mask(source / f"mask_{entry.value}.png", height=image.shape[0], width=image.shape[1])
    try:
        return prepare(image, size=size, mask=mask, box=entry.box, augment=augment, rng=rng)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def prepare(
    image: Pixels,
    *,
    size: int,
    mask: Mask | None = None,
    box: Box | None = None,
    augment: Augment | None = None,
    rng: np.random.Generator | None = None,
) -> Tensor:
    """Make an image prompt: white outside the mask, cropped to the box, square, varied, and resized.

    Args:
        image: `h w 3` RGB.
        size: side of the result in pixels.
        mask: `h w`, true on the subject; without it the whole image is the subject.
        box: `(x0, y0, x1, y1)` in pixels; the mask's own box where it is None.
        augment, rng: how to vary the result, and with which random numbers; both or neither.

    Returns:
        `3 s s` float32 in [-1, 1].

    Raises:
        ValueError: the mask is empty or of another size, or the box leaves the image.
    """
    if size < 1:
        raise ValueError(f"data.image_size is {size}; it must be at least 1")
    if (augment is None) != (rng is None):
        raise ValueError("augment and rng belong together; give both to vary the image prompt, or neither")
    height, width, _ = image.shape
    if mask is not None and mask.shape != (height, width):
        raise ValueError(f"mask is {mask.shape}, the image {(height, width)}; resize the mask to the image")
    x0, y0, x1, y1 = pixel_box(box, mask, height=height, width=width)
    if augment is not None and rng is not None and augment.trim:
        x0, y0, x1, y1 = _trim(x0, y0, x1, y1, augment, rng)
    picture = torch.from_numpy(image[y0:y1, x0:x1].astype(np.float32) / np.float32(127.5) - np.float32(1))
    if mask is not None:
        picture[torch.from_numpy(~mask[y0:y1, x0:x1])] = 1.0
    square = _pad_to_square(rearrange(picture, "h w c -> 1 c h w"))
    if augment is not None and rng is not None:
        square = _turn(square, augment, rng)
    resized = F.interpolate(square, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return rearrange(resized, "1 c h w -> c h w").clamp(-1, 1)


def read_rgb(path: str | Path) -> Pixels:
    """Read an RGB image, upright.

    Returns:
        `h w 3`.

    Raises:
        ValueError: the file is missing or broken, or the image is grey, has a palette or transparency, or is
        CMYK. What such an image should look like is the user's to say, so nothing is converted silently.
    """
    with _open(path) as image:
        if image.mode != "RGB":
            raise ValueError(
                f"{path}: the image's mode is {image.mode}, and it must be RGB; convert it first, e.g. "
                "PIL.Image.open(path).convert('RGB') (put a transparent image on white before that)"
            )
        return np.array(ImageOps.exif_transpose(image))


def read_mask(path: str | Path, *, height: int, width: int) -> Mask:
    """Read a mask for an image of the given size; foreground may be 1, 255, or any one value.

    Returns:
        `h w`; a mask of another size but equal proportions is resized.

    Raises:
        ValueError: the file is missing or broken, empty, in colour, or of other proportions than the image.
    """
    with _open(path) as image:
        if image.mode not in ("1", "L", "P", "I", "I;16"):
            raise ValueError(f"{path}: the mask's mode is {image.mode}; it must have one channel (mode L)")
        values = np.array(image).astype(np.int64)
    mask = 2 * values > values.max()  # halfway between background and foreground, whatever the latter's value
    if not mask.any():
        raise ValueError(f"{path}: the mask is empty; draw the subject, or leave the example out")
    rows, columns = mask.shape
    if (rows, columns) == (height, width):
        return mask
    # Proportions are equal if some scale gives the image's size up to rounding.
    if abs(columns * height - width * rows) > max(height, width, rows, columns):
        raise ValueError(
            f"{path}: the mask is {columns}x{rows}, the image {width}x{height}, of other proportions; "
            "make the mask from this image"
        )
    soft = rearrange(torch.from_numpy(mask).float(), "h w -> 1 1 h w")
    resized = F.interpolate(soft, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return (resized[0, 0] > 0.5).numpy()


def read_entries(path: str | Path) -> list[Entry]:
    """Read the subjects of a `mask.json`, without the background.

    Raises:
        ValueError: the file is missing, is no such list, or names no subject.
    """
    path = Path(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        entries = [_entry(item) for item in items if item["value"] != 0]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: there is no such file; check the path") from error
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(
            f"{path}: not a list of objects with value, label, logit and box of four numbers "
            f"({type(error).__name__}: {error}); write it as Grounded-SAM does"
        ) from error
    if not entries:
        raise ValueError(
            f"{path}: names no subject beside the background (value 0); add one, or leave it out"
        )
    return entries


def pixel_box(box: Box | None, mask: Mask | None, *, height: int, width: int) -> tuple[int, int, int, int]:
    """The whole pixels that a box covers, `(x0, y0, x1, y1)` with the ends exclusive.

    Without a box it is the mask's own, and without either the whole image. A box may leave the image by one
    pixel, which is rounding, and is clamped.

    Raises:
        ValueError: the box is empty or leaves the image, or no pixel of the mask lies in it.
    """
    if box is None:
        if mask is None:
            return 0, 0, width, height
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(rows):
            raise ValueError("mask is empty; draw the subject, or leave the example out")
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    x0, y0, x1, y1 = box
    inside = x0 >= -1 and y0 >= -1 and x1 <= width + 1 and y1 <= height + 1
    if not (inside and x1 > x0 and y1 > y0):
        raise ValueError(
            f"box is {list(box)} and the image is {width}x{height}; "
            "it must be [x0, y0, x1, y1] in pixels, not empty, inside the image"
        )
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    right, bottom = min(width, math.ceil(x1)), min(height, math.ceil(y1))
    if mask is not None and not mask[top:bottom, left:right].any():
        raise ValueError(f"mask is empty inside the box {list(box)}; the two must belong to one image")
    return left, top, right, bottom


def _entry(item: dict[str, Any]) -> Entry:
    x0, y0, x1, y1 = (float(number) for number in item["box"])
    if type(item["value"]) is not int or not isinstance(item["label"], str):
        raise TypeError(f"value {item['value']!r} must be a whole number and label {item['label']!r} a text")
    return Entry(
        value=item["value"], label=item["label"], logit=float(item.get("logit", 1.0)), box=(x0, y0, x1, y1)
    )


def _open(path: str | Path) -> Image.Image:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace it, or leave it out") from error
    return image


def _trim(
    x0: int, y0: int, x1: int, y1: int, augment: Augment, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    side, share = int(rng.integers(4)), float(rng.uniform(0.01, augment.trim))
    across, down = min(round(share * (x1 - x0)), x1 - x0 - 1), min(round(share * (y1 - y0)), y1 - y0 - 1)
    cuts = ((across, 0, 0, 0), (0, down, 0, 0), (0, 0, -across, 0), (0, 0, 0, -down))[side]
    return x0 + cuts[0], y0 + cuts[1], x1 + cuts[2], y1 + cuts[3]


def _pad_to_square(picture: Tensor) -> Tensor:
    _, _, height, width = picture.shape
    across, down = max(height - width, 0), max(width - height, 0)
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(picture, margins, value=1.0)


def _turn(square: Tensor, augment: Augment, rng: np.random.Generator) -> Tensor:
    # Both numbers are always drawn, so that switching one variation off leaves the other as it was.
    mirrored, angle = bool(rng.random() < 0.5), math.radians(rng.uniform(-1, 1) * augment.degrees)
    if augment.flip and mirrored:
        square = square.flip(-1)
    if not angle:
        return square
    cos, sin = math.cos(angle), math.sin(angle)
    grid = F.affine_grid(
        torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), list(square.shape), align_corners=False
    )
    # grid_sample fills with zeros; shifted by one, zero is white.
    return F.grid_sample(square - 1, grid, align_corners=False) + 1
