"""Metrics on pixels: PSNR and motion."""

from __future__ import annotations

import math

from torch import Tensor

from dit_booth.evaluation.check import check_pictures


def psnr(a: Tensor, b: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB of two pictures or videos in [-1, 1]; infinite if they are equal.

    Over a video it is the PSNR of the mean squared error of all frames, not the mean of the frames' PSNR.

    Raises:
        ValueError: the shapes differ, or the tensors are empty.
    """
    if a.shape != b.shape or a.numel() == 0:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; compare equal shapes")
    error = float((a.detach().double().clamp(-1, 1) - b.detach().double().clamp(-1, 1)).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def motion(video: Tensor) -> float:
    """Compute the mean absolute difference of consecutive frames, as a share of the range: 1 is black to white.

    A still video has the best consistency scores: report motion beside them, and beside the ground truth's.

    Args:
        video: `f 3 h w` in [-1, 1], at least two frames.

    Raises:
        ValueError: the video has the wrong shape, or a single frame.
    """
    check_pictures("video", video, axes="f 3 h w")
    if len(video) < 2:
        raise ValueError("video has 1 frame; motion needs at least 2")
    values = video.detach().float().clamp(-1, 1)
    return float((values[1:] - values[:-1]).abs().mean() / 2)
