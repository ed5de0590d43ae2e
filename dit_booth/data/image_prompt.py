"""The image prompt: a subject cut out on white, cropped to its box, padded to a square (as in VideoBooth)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dit_booth.data.image_files import Box, Mask, Pixels, read_entries, read_mask, read_rgb
from dit_booth.data.image_input import ImageLike, MaskLike, to_colours, to_mask

WHITE = 0.98
"""Values of [-1, 1] from here on are white; a picture of nothing else shows no subject."""


def shows_subject(images: Tensor) -> Tensor:
    """Tell which image prompts (b 3 s s) are not all white: (b,), boolean."""
    return images.flatten(1).amin(1) < WHITE


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random variation of image prompts in training, so that the model learns the subject and not its pose.

    Attributes:
        flip: mirror half of the images.
        degrees: rotate by an angle from [-degrees, degrees], with white in the corners.
        trim: cut one side of the box by a fraction from [0.01, trim]; 0 cuts nothing (VideoBooth's second
            stage: 0.2).
    """

    flip: bool = True
    degrees: float = 30.0
    trim: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.degrees <= 180:
            raise ValueError(f"augment.degrees is {self.degrees}; it must be in [0, 180]")
        if self.trim != 0 and not 0.01 <= self.trim < 1:
            raise ValueError(f"augment.trim is {self.trim}; it must be 0 (off) or in [0.01, 1)")


def of_number(images: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return the first `count` of an example's image prompts (`3 s s` each); absent ones are the zero image."""
    absent = [torch.zeros_like(images[0])] * (count - len(images))
    return [*images[:count], *absent]


def load_image_prompt(
    source: str | Path, *, size: int, augment: Augment | None = None, rng: np.random.Generator | None = None
) -> Tensor:
    """Read an image prompt from an image file, or from a folder with `image.jpg` and optionally a mask.

    A mask is `mask.json` with `mask_<value>.png` (see `dit_booth.data.image_files`). With one, the subject (the
    entry with the highest logit) is cut out; without one, the whole image is padded to a square with white.
    Variation needs both `augment` and `rng`.

    Returns:
        `3 s s` float32 in [-1, 1].

    Raises:
        ValueError: a file is missing, the image is not RGB, or the mask does not fit it.
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


def as_image_prompt(image: ImageLike, *, size: int, mask: MaskLike | None = None) -> Tensor:
    """Make an image prompt from whatever holds an image, as `prepare` makes those of a data set.

    With a mask, or where pixels are transparent, the subject is cut out, put on white, and centered; otherwise
    the whole image is padded to a square with white.

    Args:
        image: a path (an image file, or a folder as `load_image_prompt` takes it); a PIL image; an array `h w`,
            `h w 3` or `h w 4`, uint8 or floats in [0, 1]; or a tensor `3 h w` or `4 h w`, uint8, or, with 3
            channels, floats in [-1, 1]. A fourth channel is alpha; pixels below half opacity are cut away.
            The EXIF orientation of files and PIL images is applied.
        size: side of the result in pixels.
        mask: the path of an image with one channel, a PIL image with one channel, or an array or tensor `h w`, of
            the (upright) image's size: 0 outside the subject, one other value on it. Soft edges are cut at half of
            the largest value.

    Returns:
        `3 s s` float32 in [-1, 1], on the CPU.

    Raises:
        ValueError: a file cannot be read; the image or the mask has another shape, type or range, holds NaN, or is
            empty; or a folder comes with a mask.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    if isinstance(image, str | Path) and Path(image).expanduser().is_dir():
        if mask is not None:
            raise ValueError(f"mask is given with the folder {image}; pass the image file, or no mask")
        return load_image_prompt(Path(image).expanduser(), size=size)
    colours, subject = to_colours(image)
    height, width = subject.shape
    if not subject.any():
        raise ValueError("image is transparent: no pixel is half opaque; pass one that shows the subject")
    if mask is not None:
        subject = subject & to_mask(mask, height=height, width=width)
    if not subject.any():
        raise ValueError("mask is empty where the image is opaque; mark pixels that can be seen")
    x0, y0, x1, y1 = pixel_box(None, subject, height=height, width=width)
    picture = torch.from_numpy(colours[y0:y1, x0:x1].copy())
    return _resize(_square_on_white(picture, subject[y0:y1, x0:x1]), size)


def cut_to_aspect(images: Tensor, height: int, width: int) -> Tensor:
    """Cut the largest rectangle of a video's aspect out of the middle of image prompts: `b 3 s s` to `b 3 h' w'`.

    An image of the video's aspect, which was padded to a square, comes back without its padding.
    """
    side, longer = images.shape[-1], max(height, width)
    down, across = (max(1, round(side * n / longer)) for n in (height, width))
    top, left = (side - down) // 2, (side - across) // 2
    return images[..., top : top + down, left : left + across]


def resized_to(images: Tensor, height: int, width: int) -> Tensor:
    """Resize `b 3 h' w'` to `b 3 height width`, clamped to [-1, 1]; equal sizes stay as they are."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)


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
        augment, rng: the variation, and the generator that draws it; both or neither.

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
    square = _square_on_white(picture, None if mask is None else mask[y0:y1, x0:x1])
    if augment is not None and rng is not None:
        square = _flip_and_rotate(square, augment, rng)
    return _resize(square, size)


def pixel_box(box: Box | None, mask: Mask | None, *, height: int, width: int) -> tuple[int, int, int, int]:
    """Round a box outwards to whole pixels: `(x0, y0, x1, y1)` with exclusive ends.

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


def _trim(
    x0: int, y0: int, x1: int, y1: int, augment: Augment, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    side, share = int(rng.integers(4)), float(rng.uniform(0.01, augment.trim))
    across, down = min(round(share * (x1 - x0)), x1 - x0 - 1), min(round(share * (y1 - y0)), y1 - y0 - 1)
    cuts = ((across, 0, 0, 0), (0, down, 0, 0), (0, 0, -across, 0), (0, 0, 0, -down))[side]
    return x0 + cuts[0], y0 + cuts[1], x1 + cuts[2], y1 + cuts[3]


def _square_on_white(picture: Tensor, mask: Mask | None) -> Tensor:
    """`h w 3` with white outside the mask, padded to `1 3 s s`; writes into `picture`."""
    if mask is not None:
        picture[torch.from_numpy(~mask)] = 1.0
    height, width, _ = picture.shape
    across, down = max(height - width, 0), max(width - height, 0)
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return F.pad(rearrange(picture, "h w c -> 1 c h w"), margins, value=1.0)


def _resize(square: Tensor, size: int) -> Tensor:
    """`1 3 s s` to `3 size size`, clamped to [-1, 1]."""
    return rearrange(resized_to(square, size, size), "1 c h w -> c h w")


def _flip_and_rotate(square: Tensor, augment: Augment, rng: np.random.Generator) -> Tensor:
    # Both values are always drawn: switching one variation off leaves the other unchanged.
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
