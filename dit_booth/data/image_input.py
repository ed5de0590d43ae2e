"""Convert the images and masks that users pass: paths, PIL images, arrays and tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from dit_booth.data.image_files import MASK_MODES, Mask, open_image

ImageLike = str | Path | Image.Image | NDArray[np.generic] | Tensor
"""A file; a PIL image; an array `h w`, `h w 3` or `h w 4`; or a tensor `3 h w` or `4 h w`."""
MaskLike = str | Path | Image.Image | NDArray[np.generic] | Tensor
"""A file, a PIL image, an array or a tensor, of one channel (`h w`)."""

Colours = NDArray[np.float32]

_IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


def to_colours(image: ImageLike) -> tuple[Colours, Mask]:
    """Return an image's colours, `h w 3` in [-1, 1], and `h w` bool, true where it is at least half opaque.

    Raises:
        ValueError: see `as_image_prompt`.
    """
    name = f"image {image}" if isinstance(image, str | Path) else "image"
    if isinstance(image, str | Path):
        image = open_image(Path(image).expanduser())
    if isinstance(image, Image.Image):
        image = _pil_to_array(image, name)
    if isinstance(image, Tensor):
        values = _scale_tensor(image)
    elif isinstance(image, np.ndarray):
        values = _scale_array(image)
    else:
        raise ValueError(f"image is a {type(image).__name__}; pass a path, a PIL image, an array or a tensor")
    opaque = values[..., 3] > 0 if values.shape[2] == 4 else np.ones(values.shape[:2], dtype=bool)
    return values[..., :3], opaque


def to_mask(mask: MaskLike, *, height: int, width: int) -> Mask:
    """Return a mask as `h w` bool: true above half of its largest value, so soft edges are cut in the middle.

    Raises:
        ValueError: see `as_image_prompt`.
    """
    name = f"mask {mask}" if isinstance(mask, str | Path) else "mask"
    if isinstance(mask, str | Path):
        mask = open_image(Path(mask).expanduser())
    if isinstance(mask, Image.Image):
        if mask.mode not in MASK_MODES:
            raise ValueError(f"{name} has mode {mask.mode}; it must have one channel: use .convert('L')")
        mask = np.array(ImageOps.exif_transpose(mask))
    if isinstance(mask, Tensor):
        mask = mask.detach().to("cpu", torch.float64).numpy()
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biuf":
        found = mask.dtype if isinstance(mask, np.ndarray) else type(mask).__name__
        raise ValueError(f"{name} is {found}; pass a path, a PIL image, or an array or tensor of numbers")
    values = mask.astype(np.float64)
    if values.shape != (height, width):
        raise ValueError(
            f"{name} has shape {values.shape}; it must be the image's (h w) = {(height, width)}: "
            "make the mask from this image, with one channel"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity; mark the subject with 1 and the rest with 0")
    subject: Mask = 2 * values > values.max()
    if not subject.any():
        raise ValueError(f"{name} is empty; mark the subject with 1, or pass mask=None for the whole image")
    return subject


def _pil_to_array(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """Upright pixels, `h w 3`, or `h w 4` if the image can be transparent."""
    if image.mode not in _IMAGE_MODES or 0 in image.size:
        raise ValueError(
            f"{name} has mode {image.mode} and size {image.size}; its mode must be one of "
            f"{', '.join(_IMAGE_MODES)}, and it must not be empty: use .convert('RGB')"
        )
    try:
        upright = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is not readable ({error}); replace it") from error
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    return np.array(upright.convert("RGBA" if transparent else "RGB"))


def _scale_tensor(image: Tensor) -> Colours:
    """`c h w` (uint8, or 3 channels of floats in [-1, 1]) to `h w c` in [-1, 1]."""
    if image.ndim != 3 or image.shape[0] not in (3, 4) or image.numel() == 0:
        raise ValueError(
            f"image has shape {tuple(image.shape)}; a tensor must be (3 h w) or (4 h w), not empty: "
            "take one image of a batch, and move the channels to the front"
        )
    pixels = rearrange(image.detach().cpu(), "c h w -> h w c")
    if image.dtype == torch.uint8:
        return _scale_array(pixels.numpy())
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}; a tensor must be torch.uint8, or floats in [-1, 1]")
    if image.shape[0] == 4:
        raise ValueError(
            f"image is {image.dtype} of shape {tuple(image.shape)}; with floats pass (3 h w), and alpha as `mask`"
        )
    values: Colours = pixels.float().numpy()
    _check_range(values, -1, "tensor", "scale x * 2 - 1 from [0, 1]")
    return values


def _scale_array(image: NDArray[np.generic]) -> Colours:
    """`h w` or `h w c` (uint8, or floats in [0, 1]) to `h w c` in [-1, 1]."""
    pixels = repeat(image, "h w -> h w 3") if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or pixels.size == 0:
        raise ValueError(
            f"image has shape {image.shape}; an array must be (h w), (h w 3) or (h w 4), not empty"
        )
    if image.dtype == np.uint8:
        return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if image.dtype.kind != "f":
        raise ValueError(f"image is {image.dtype}; an array must be uint8, or floats in [0, 1]")
    values = pixels.astype(np.float32)
    _check_range(values, 0, "array", "divide by 255, or pass a tensor in [-1, 1]")
    return values * np.float32(2) - np.float32(1)


def _check_range(values: Colours, low: int, kind: str, fix: str) -> None:
    # NaN fails the comparison too.
    if not (values.min() >= low and values.max() <= 1):
        raise ValueError(
            f"image spans [{values.min():g}, {values.max():g}]; floats of a {kind} must lie in [{low}, 1]: {fix}"
        )
