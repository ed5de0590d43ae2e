"""Clips that are obviously worse, for attention checks: wrong subject and text, coarse, and out of order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from dit_booth.data.video import probe, read_video, write_video

_BLOCKS = 12  # squares along the shorter side of a broken video


def write_broken(source: Path, out: Path, *, like: Path, seed: int) -> None:
    """Write the video `source`, of another prompt, coarse and with its frames shuffled, as long and large as `like`."""
    info = probe(like)
    pixels = read_video(source)
    rng = np.random.default_rng(seed)
    order = np.resize(rng.permutation(len(pixels)), info.frames)
    video = torch.from_numpy(pixels[order])
    write_video(out, coarsen(rearrange(video, "f h w c -> f c h w"), info.height, info.width), fps=info.fps)


def coarsen(video: Tensor, height: int, width: int) -> Tensor:
    """Average a video `f 3 h w` (uint8) over large squares, and return it at another size, in [-1, 1]."""
    side = max(1, min(height, width) // _BLOCKS)
    rows, columns = -(-height // side), -(-width // side)
    resized = torch.nn.functional.interpolate(video.float(), (rows * 4, columns * 4), mode="area")
    blocks = reduce(resized, "f c (h a) (w b) -> f c h w", "mean", a=4, b=4)
    large = repeat(blocks, "f c h w -> f c (h a) (w b)", a=side, b=side)
    return large[..., :height, :width] / 127.5 - 1
