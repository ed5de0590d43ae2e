"""An example on disk: where its video, its caption and its subject's mask lie; checked once, then loaded on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dit_booth.data.example import Example
from dit_booth.data.image_files import (
    Box,
    Mask,
    MaskEntry,
    Pixels,
    read_cutout,
    read_entries,
    read_mask,
    read_rgb,
)
from dit_booth.data.image_prompt import Augment, of_number, pixel_box, prepare
from dit_booth.data.media import Media
from dit_booth.data.shapes import Shape, choose_shape
from dit_booth.data.video import check_length, probe, read_video
from dit_booth.files import within

Check = Callable[[str, str], object]
"""Raises ValueError, with the reason, if a caption lacks a subject."""


def check_caption(caption: str, subject: str) -> None:
    """Raise an error if a caption does not contain `subject` as whole words (case-insensitive).

    VideoBooth's coarse stage replaces the embeddings of the subject's words, so the caption must have them.

    Raises:
        ValueError: naming both.
    """
    words = subject.split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    if not words or re.search(rf"(?<!\w){pattern}(?!\w)", caption, flags=re.IGNORECASE) is None:
        raise ValueError(f"the caption {caption!r} does not contain the subject {subject!r} as whole words")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example as a format lists it, not checked.

    Attributes:
        key: name of the example, unique in the set.
        caption: the text prompt.
        video: the video; an image if `still`.
        masks: folder with `mask.json` and `mask_<value>.png` of several subjects, of which the caption has one.
        subject, mask, box: the one subject, where the format names it; without a mask, the whole first frame is the
            image prompt. A box alone is cut out with its background.
        image_from: key of the example that the image prompt is cut from; empty: its own first frame.
        references: pictures that are the image prompts instead, in order; with transparency, what is opaque.
        still: the video is an image, and the example has one frame.
        fault: the reason why the example is broken, if its caption cannot be read.
    """

    key: str
    caption: str
    video: Media
    masks: Path | None = None
    subject: str = ""
    mask: Media | None = None
    box: Box | None = None
    image_from: str = ""
    references: tuple[Media, ...] = ()
    still: bool = False
    fault: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row that passed the checks, with the mask and the box of its subject, and the shape that it is read in."""

    row: Row
    shape: Shape
    subject: str
    mask: Media | None
    box: Box | None

    def first_frame(self) -> tuple[Pixels, Mask | None]:
        """Read the first frame, `h w 3`, and the mask on it."""
        frame = read_rgb(self.row.video) if self.row.still else read_video(self.row.video, frames=1)[0]
        return frame, self.read_mask(frame)

    def read_mask(self, frame: Pixels) -> Mask | None:
        height, width, _ = frame.shape
        return None if self.mask is None else read_mask(self.mask, height=height, width=width)


def check_row(row: Row, root: Path, *, shapes: Sequence[Shape], stride: int, check: Check) -> Item:
    """Read a row's header, mask and caption, without decoding its video, and choose its shape.

    Raises:
        ValueError: the reason why the example is broken; of class `Escapes`, that a path leads out of `root`.
    """
    if row.fault:
        raise ValueError(row.fault)
    subject, mask, box = row.subject, row.mask, row.box
    if row.masks is not None:
        folder = row.masks.relative_to(root)
        entry = subject_of(row, read_entries(safe(root, folder / "mask.json")), check)
        subject, box, mask = entry.label, entry.box, safe(root, folder / f"mask_{entry.value}.png")
    elif subject:
        check(row.caption, subject)
    if row.still:
        height, width, _ = read_rgb(row.video).shape
        shape = choose_shape(shapes, frames=1, height=height, width=width, stride=1) or alone(row, shapes)
    else:
        info = probe(row.video)
        height, width = info.height, info.width
        found = choose_shape(shapes, frames=info.frames, height=height, width=width, stride=stride)
        shape = found or min(shapes)
        check_length(row.video, info, start=0, frames=shape.frames, stride=stride)
    pixels = None if mask is None else read_mask(mask, height=height, width=width)
    pixel_box(box, pixels, height=height, width=width)
    for reference in row.references:
        read_cutout(reference)
    return Item(row=row, shape=shape, subject=subject, mask=mask, box=box)


def alone(row: Row, shapes: Sequence[Shape]) -> Shape:
    """Return the only shape, for a picture among other pictures. ValueError: there are several, none of one frame."""
    if len(shapes) > 1:
        raise ValueError(
            f"{row.video}: is a picture, and data.buckets has no shape of one frame; add one, such as"
            f" {shapes[0]._replace(frames=1)}"
        )
    return shapes[0]


class Escapes(ValueError):
    """A path leads out of the data's root: an error whatever number of broken examples is allowed."""


def safe(root: Path, path: Path) -> Path:
    """Return `root / path`. `Escapes`: it leads out of `root`."""
    try:
        return within("data.triplets.root", root, path)
    except ValueError as error:
        raise Escapes(str(error)) from error


def subject_of(row: Row, entries: Sequence[MaskEntry], check: Check = check_caption) -> MaskEntry:
    """Return the entry with the highest logit whose label passes `check` with the caption.

    Raises:
        ValueError: the caption has none of the labels.
    """
    reasons = []
    for entry in sorted(entries, key=lambda entry: -entry.logit):
        try:
            check(row.caption, entry.label)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return entry
    labels = ", ".join(repr(entry.label) for entry in entries)
    raise ValueError(
        f"the caption has none of the mask's labels ({labels}): {reasons[0]}; "
        "write the label into the caption, or correct mask.json"
    )


def load_item(
    item: Item,
    prompt: Item,
    *,
    stride: int,
    image_size: int,
    image_prompts: int,
    augment: Augment | None,
    rng: np.random.Generator | None,
) -> Example:
    """Read an example; its image prompts are those of `prompt`, mostly itself.

    Raises:
        ValueError: a file is broken; the message names the example.
    """
    row, shape = item.row, item.shape
    try:
        pictures = (
            read_rgb(row.video)[None]
            if row.still
            else read_video(row.video, frames=shape.frames, stride=stride)
        )
        mask = item.read_mask(pictures[0])
        seen = (pictures[0], mask) if prompt is item else None
        image, *further = cut_prompts(prompt, seen, image_size, image_prompts, augment, rng)
        video, small = fit_about(item, pictures, mask, shape)
    except (ValueError, OSError) as error:
        raise ValueError(f"example {row.key}: {error}") from error
    masks = torch.zeros(video.shape[0], *small.shape, dtype=torch.bool)
    masks[0] = small
    return Example(
        key=row.key,
        video=video,
        caption=row.caption,
        subject=item.subject,
        image=image,
        mask=masks,
        mask_frames=1,
        further=tuple(further),
    )


def cut_prompts(
    item: Item,
    seen: tuple[Pixels, Mask | None] | None,
    size: int,
    count: int,
    augment: Augment | None,
    rng: np.random.Generator | None,
) -> list[Tensor]:
    """Make the `count` image prompts (`3 s s` each) of an item; absent ones are zero.

    They are its reference pictures or, without any, one that is cut out of its first frame; `seen`: that frame and its
    mask, if known.
    """
    cutouts: list[tuple[Pixels, Mask | None, Box | None]]
    if item.row.references:
        cutouts = [(*read_cutout(picture), None) for picture in item.row.references[:count]]
    else:
        cutouts = [(*(seen or item.first_frame()), item.box)]
    images = [
        prepare(pixels, size=size, mask=mask, box=box, augment=augment, rng=rng)
        for pixels, mask, box in cutouts
    ]
    return of_number(images, count)


def read_clip(item: Item, start: int, shape: Shape, stride: int) -> Tensor | None:
    """Read a clip of an item's video from frame `start` on (f 3 h w in [-1, 1]), cropped about the subject in frame 0.

    None: the video is a picture, or ends before.
    """
    if item.row.still or start + shape.needs(stride) > probe(item.row.video).frames:
        return None
    pictures = read_video(item.row.video, start=start, frames=shape.frames, stride=stride)
    return fit_about(item, pictures, item.read_mask(pictures[0]), shape)[0]


def fit_about(item: Item, pictures: Pixels, mask: Mask | None, shape: Shape) -> tuple[Tensor, Tensor]:
    """Fit pictures (f h w 3) and the mask of frame 0 to a shape, cropped about the item's subject in that frame."""
    _, height, width, _ = pictures.shape
    box = pixel_box(item.box, mask, height=height, width=width)
    shown = np.zeros((height, width), bool) if mask is None else mask
    return fit(torch.from_numpy(pictures), shown, box=box, size=shape[1:])


def fit(
    pictures: Tensor, mask: Mask, *, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Scale a video to cover `size`, and crop it to `size` about the subject.

    The crop is central, moved as little as needed for the subject's box (in frame 0) to be inside; a box
    larger than the crop is centred. Every frame is cropped alike.

    Args:
        pictures: `f h w 3` uint8.
        mask: `h w`, of frame 0.
        box: `(x0, y0, x1, y1)` of the subject in frame 0, in pixels.
        size: height and width of the result.

    Returns:
        The video, `f 3 h w` float32 in [-1, 1], and the mask, `h w` bool.
    """
    _, height, width, _ = pictures.shape
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    x0, y0, x1, y1 = (scale * edge for edge in box)
    top = _offset(scaled[0], size[0], y0, y1)
    left = _offset(scaled[1], size[1], x0, x1)
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    # Resizing uint8 is faster than float.
    video = F.interpolate(
        rearrange(pictures, "f h w c -> f c h w"),
        size=scaled,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )[window]
    soft = rearrange(torch.from_numpy(mask).float(), "h w -> 1 1 h w")
    small = F.interpolate(soft, size=scaled, mode="bilinear", antialias=True, align_corners=False)[window]
    return video.float().div(127.5).sub(1).contiguous(), small[0, 0] > 0.5


def _offset(length: int, window: int, start: float, end: float) -> int:
    """Start of a window of `window` pixels on an axis of `length`, moved to contain [start, end] if possible."""
    offset = (length - window) / 2
    offset = (start + end - window) / 2 if end - start > window else min(max(offset, end - window), start)
    return min(max(round(offset), 0), length - window)
