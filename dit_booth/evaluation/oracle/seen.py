"""A video as the oracle sees it: its frames, their smooth backgrounds, and how much of each pixel is subject."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dit_booth.evaluation.segment import background

Plane = NDArray[np.float32]
FIT_SIDE = 64  # frames with longer sides are reduced to this before poses are fitted


@dataclass(frozen=True)
class Seen:
    """Frames and backgrounds, `f 3 h w` in [0, 1]; masks, `f h w` bool; coverage by the subject, `f h w` in [0, 1]."""

    frames: Plane
    ground: Plane
    masks: NDArray[np.bool_]
    cover: Plane

    @property
    def found(self) -> NDArray[np.bool_]:
        """Return the frames that have a subject, `f`."""
        return np.asarray(self.masks.any(axis=(1, 2)))

    def only(self, frames: NDArray[np.bool_]) -> Seen:
        """Return the chosen frames alone."""
        return Seen(self.frames[frames], self.ground[frames], self.masks[frames], self.cover[frames])


def see(video: Tensor, masks: Tensor, *, side: int | None = None) -> Seen:
    """Estimate background and coverage of every frame.

    Args:
        video: `f 3 s s` in [-1, 1]; values beyond are clamped.
        masks: `f s s` bool, the segmented subject.
        side: reduce the frames to this side first, by averaging areas; None: keep theirs.

    Raises:
        ValueError: the frames are not square, as the toy world's are.
    """
    height, width = video.shape[-2:]
    if height != width:
        raise ValueError(f"video has frames of {height} x {width} pixels; the toy world's are square")
    pixels = (video.detach().cpu().float().clamp(-1, 1) + 1) / 2
    if side is not None and side < width:
        pixels = F.interpolate(pixels, (side, side), mode="area")
        masks = (
            F.interpolate(rearrange(masks.float(), "f h w -> f 1 h w"), (side, side), mode="area")[:, 0] > 0.5
        )
    frames, inside = pixels.numpy(), masks.cpu().numpy()
    ground = np.stack(
        [
            rearrange(background(rearrange(frame, "c h w -> h w c"), mask), "h w c -> c h w")
            for frame, mask in zip(frames, inside, strict=True)
        ]
    ).astype(np.float32)
    cover = np.stack([_cover(*each) for each in zip(frames, ground, inside, strict=True)])
    return Seen(frames, np.clip(ground, 0, 1), inside, cover)


def _cover(frame: Plane, ground: Plane, mask: NDArray[np.bool_]) -> Plane:
    """Estimate the coverage of each pixel: 1 inside, and along the outline by mixing background and nearest inside."""
    if not mask.any():
        return np.zeros(mask.shape, np.float32)
    inside = ndimage.binary_erosion(mask, border_value=1)
    if not inside.any():
        inside = mask
    nearest = ndimage.distance_transform_edt(~inside, return_distances=False, return_indices=True)
    step = frame[:, nearest[0], nearest[1]] - ground
    share = ((frame - ground) * step).sum(axis=0) / np.maximum(np.square(step).sum(axis=0), 1e-4)
    around = ndimage.binary_dilation(mask)
    return np.where(inside, 1, np.where(around, np.clip(share, 0, 1), 0)).astype(np.float32)
