"""Crops to the subject: similarity of whole pictures also counts the background, which rewards copying it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.evaluation.segment import WHITE, subject_mask

FindSubject = Callable[[Tensor], Tensor]
"""Frames `f 3 h w` in [-1, 1] -> masks `f h w`, bool, true on the subject (a box is a mask that is a rectangle)."""
_SIDE = 128  # longer side of the pictures that are segmented; fine detail does not move a bounding box


def find_on_smooth(frames: Tensor) -> Tensor:
    """Return the subjects' masks (f h w, bool, on the CPU) of frames (f 3 h w) with smooth backgrounds.

    Fits the toy world and subjects on plain ground (`segment.subject_mask`); for other videos give a segmenter.
    """
    return torch.stack([_segment(frame) for frame in frames])


def find_on_white(images: Tensor) -> Tensor:
    """Return the subjects' masks (n h w, bool, on the CPU) of image prompts (n 3 h w) on white."""
    return torch.stack([_segment(image, white=True) for image in images])


def masks_of_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return rectangles as masks (n h w, bool); boxes (n 4) are x1, y1, x2, y2 in pixels."""
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    x1, y1, x2, y2 = rearrange(boxes, "n c -> c n 1")
    inside_x, inside_y = (x >= x1) & (x <= x2), (y >= y1) & (y <= y2)
    masks: Tensor = rearrange(inside_y, "n h -> n h 1") & rearrange(inside_x, "n w -> n 1 w")
    return masks


def crop_to_subject(picture: Tensor, mask: Tensor) -> Tensor:
    """Return the subject (3 s s) of a picture (3 h w), centered on a white square as large as its longer side.

    What lies outside the mask (h w, bool) becomes white, like the background of an image prompt. Without a subject
    the whole picture is returned, so that a subject that vanishes scores like its background.
    """
    if not bool(mask.any()):
        return picture
    mask = mask.to(picture.device)
    rows, columns = (mask.any(dim=axis).nonzero().flatten() for axis in (1, 0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    subject = torch.where(mask, picture, picture.new_ones(()))[:, top:bottom, left:right]
    side = max(bottom - top, right - left)
    above, before = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    margins = (before, side - (right - left) - before, above, side - (bottom - top) - above)
    return F.pad(subject, margins, value=1.0)


def crop_subjects(pictures: Tensor, find: FindSubject) -> list[Tensor]:
    """Crop every picture (n 3 h w, [-1, 1]) to its subject: `n` pictures 3 s s, each of its own size.

    Raises:
        ValueError: `find` returned something else than masks of the pictures' size.
    """
    masks = find(pictures)
    wanted = (len(pictures), *pictures.shape[-2:])
    if tuple(masks.shape) != wanted or masks.dtype != torch.bool:
        raise ValueError(
            f"the masks are {masks.dtype} of shape {tuple(masks.shape)}; the segmenter must return torch.bool of"
            f" shape (f h w) = {wanted}"
        )
    return [crop_to_subject(picture, mask) for picture, mask in zip(pictures, masks, strict=True)]


def _segment(picture: Tensor, *, white: bool = False) -> Tensor:
    height, width = picture.shape[-2:]
    scale = _SIDE / max(height, width)
    small = picture.detach().float().cpu()
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        small = F.interpolate(small[None], size, mode="bilinear", antialias=True)[0]
    mask = subject_mask(small, background=WHITE if white else None)
    if scale < 1:
        grown = F.interpolate(repeat(mask.float(), "h w -> 1 1 h w"), (height, width), mode="nearest-exact")
        mask = grown[0, 0] > 0.5
    return mask
