"""Read the files of an image prompt: an image, a mask, and the list of an image's masks.

`mask.json` is a list of `{"value", "label", "logit", "box"}`, as Grounded-SAM writes it; value 0 is the
background, `mask_<value>.png` lies beside it, and a box is `[x0, y0, x1, y1]` in pixels of the image.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dit_booth.data.media import Media, is_file, open_media

Box = tuple[float, float, float, float]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

MASK_MODES = ("1", "L", "P", "I", "I;16")
"""PIL's modes with one channel."""


class EntryJson(TypedDict):
    """An object of `mask.json`."""

    value: int
    label: str
    logit: NotRequired[float]
    box: list[float]


@dataclass(frozen=True, kw_only=True)
class MaskEntry:
    """One subject of a `mask.json`.

    Attributes:
        value: the number in the mask's file name.
        label: the word or words for the subject.
        logit: the detector's score.
        box: `(x0, y0, x1, y1)` in pixels.
    """

    value: int
    label: str
    logit: float
    box: Box


def read_rgb(path: str | Media) -> Pixels:
    """Read an RGB image, rotated as its EXIF orientation says.

    Returns:
        `h w 3`.

    Raises:
        ValueError: the file is missing or broken, or the image is grey, has a palette or transparency, or is
        CMYK. Nothing is converted silently: only the user knows how such an image should look.
    """
    with open_image(path) as image:
        return _rgb(image, path)


def read_cutout(path: str | Media) -> tuple[Pixels, Mask | None]:
    """Read an image as `read_rgb` does, or one with transparency, with the mask of what is at least half opaque.

    Returns:
        `h w 3`, and `h w` bool, or None: the whole image.

    Raises:
        ValueError: see `read_rgb`; or nothing is opaque.
    """
    with open_image(path) as image:
        if image.mode != "RGBA":
            return _rgb(image, path), None
        pixels = np.array(ImageOps.exif_transpose(image))
    mask: Mask = pixels[..., 3] > 127
    if not mask.any():
        raise ValueError(f"{path}: no pixel is half opaque; give a picture that shows the subject")
    return pixels[..., :3], mask


def read_mask(path: str | Media, *, height: int, width: int) -> Mask:
    """Read a mask for an image of the given size; the foreground may have any single value (1, 255).

    Returns:
        `h w` bool; a mask of another size but equal proportions is resized.

    Raises:
        ValueError: the file is missing or broken, empty, in colour, or of other proportions than the image.
    """
    with open_image(path) as image:
        if image.mode not in MASK_MODES:
            raise ValueError(f"{path}: the mask's mode is {image.mode}; it must have one channel (mode L)")
        values = np.array(image).astype(np.int64)
    mask: Mask = 2 * values > values.max()  # cut soft edges in the middle
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


def read_entries(path: str | Path) -> list[MaskEntry]:
    """Read the subjects of a `mask.json`, without the background.

    Raises:
        ValueError: the file is missing, malformed, or names no subject.
    """
    path = Path(path)
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
        entries = [_parse_entry(item) for item in items if item["value"] != 0]
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; check the path") from error
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


def _parse_entry(item: EntryJson) -> MaskEntry:
    x0, y0, x1, y1 = (float(number) for number in item["box"])
    if type(item["value"]) is not int or not isinstance(item["label"], str):
        raise TypeError(f"value {item['value']!r} must be an integer and label {item['label']!r} a string")
    return MaskEntry(
        value=item["value"], label=item["label"], logit=float(item.get("logit", 1.0)), box=(x0, y0, x1, y1)
    )


def _rgb(image: Image.Image, path: str | Media) -> Pixels:
    if image.mode != "RGB":
        raise ValueError(
            f"{path}: the image's mode is {image.mode}, and it must be RGB; convert it first, e.g. "
            "PIL.Image.open(path).convert('RGB') (put a transparent image on white before that)"
        )
    return np.array(ImageOps.exif_transpose(image))


def open_image(path: str | Media) -> Image.Image:
    """Open and decode an image file. Raises ValueError, naming the file, for one that is missing or broken."""
    media = Path(path) if isinstance(path, str) else path
    if not is_file(media):
        raise ValueError(f"{path}: no such file; check the path")
    try:
        with open_media(media) as stream:
            image = Image.open(stream)
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace it, or leave it out") from error
    return image
