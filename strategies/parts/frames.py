"""References as frames: the latents of all image prompts, in the size of a video's frames."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dit_booth.inject import Reference


def latents_of(reference: Reference, *, mask: bool = False) -> Tensor:
    """Return the clean latents of all image prompts (b r c h w), zero where one is absent.

    mask: with one more channel, which is 1 where an image prompt is there.
    """
    pad = (0, 0, 0, 0, 0, int(mask))
    latents = [
        F.pad(each.latent, pad, value=1.0) * rearrange(each.present, "b -> b 1 1 1 1")
        for each in reference.all
    ]
    return torch.cat(latents, dim=1)


def resized(frames: Tensor, like: Tensor) -> Tensor:
    """Return latents (b r c h w) in the size and dtype of the frames `like` (b f c h w)."""
    if frames.shape[-2:] != like.shape[-2:]:  # a square image prompt beside a wide video
        flat = rearrange(frames, "b r c h w -> (b r) c h w")
        flat = F.interpolate(flat, like.shape[-2:], mode="bilinear", antialias=True)
        frames = rearrange(flat, "(b r) c h w -> b r c h w", b=len(frames))
    return frames.to(like.dtype)


def side_by_side(pictures: Tensor, height: int, width: int) -> Tensor:
    """Return pictures (b r c h w) laid out as one (b c height width), zero elsewhere (MAGREF's layout).

    One to three stand side by side, four in a square, each as large as its cell allows, in the middle.
    """
    b, r, c, h, w = pictures.shape
    rows, columns = (2, (r + 1) // 2) if r > 3 else (1, r)
    cell = (height // rows, width // columns)
    scale = min(cell[0] / h, cell[1] / w)
    h, w = max(1, round(scale * h)), max(1, round(scale * w))
    small = resized(pictures, pictures.new_empty(b, r, c, h, w))
    canvas = pictures.new_zeros(b, c, height, width)
    for place, picture in enumerate(small.unbind(1)):
        row, column = divmod(place, columns)
        top, left = row * cell[0] + (cell[0] - h) // 2, column * cell[1] + (cell[1] - w) // 2
        canvas[:, :, top : top + h, left : left + w] = picture
    return canvas
