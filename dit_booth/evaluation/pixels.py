"""PSNR to the real video."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from dit_booth.evaluation.case import Case, Values


def psnr_scores(case: Case) -> Mapping[str, Values]:
    """Return `psnr` of every frame; nothing without a real video, or for the real video itself."""
    if case.truth is None or case.control == "truth":
        return {}
    return {"psnr": np.array([psnr(a, b) for a, b in zip(case.video, case.truth, strict=True)])}


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
