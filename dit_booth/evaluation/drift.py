"""Drift: the change of a metric over the frames of a video, from its values frame by frame (NaN: no value).

All functions return NaN for a video of one frame, and where too few frames have a value.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def slope(values: ArrayLike) -> float:
    """Return the least-squares slope, in units of the metric per frame."""
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    if known.sum() < 2:
        return math.nan
    frame = np.flatnonzero(known) - np.flatnonzero(known).mean()
    return float((frame * array[known]).sum() / (frame**2).sum())


def last_minus_first(values: ArrayLike) -> float:
    """Return the mean of the last quarter of the frames minus that of the first quarter."""
    array = np.asarray(values, dtype=np.float64)
    return _end_minus_start(array, len(array) / 4)


def framepack(values: ArrayLike) -> float:
    """Return FramePack's drift: the absolute difference of the means of the first and the last 15 % of the frames.

    Zhang et al., "Packing Input Frame Context in Next-Frame Prediction Models for Video Generation" (2025).
    """
    array = np.asarray(values, dtype=np.float64)
    return abs(_end_minus_start(array, 0.15 * len(array)))


def _end_minus_start(array: NDArray[np.float64], length: float) -> float:
    """Return the mean of the last `length` frames, rounded and at least one, minus that of the first ones."""
    assert array.ndim == 1, array.shape
    count = max(1, math.floor(length + 0.5))
    first, last = array[:count], array[-count:]
    if len(array) < 2 or np.isnan(first).all() or np.isnan(last).all():
        return math.nan
    return float(np.nanmean(last) - np.nanmean(first))
