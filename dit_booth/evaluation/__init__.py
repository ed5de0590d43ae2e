"""Metrics of generated videos: one per file, and `evaluate` for all of them.

Metrics work on tensors; networks are passed as functions that return features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dit_booth.evaluation.clip_score import ImageFeatures, TextFeatures, clip_scores
from dit_booth.evaluation.oracle import shape_overlaps
from dit_booth.evaluation.palette import video_palette_distance
from dit_booth.evaluation.pixels import motion, psnr

__all__ = ["Statistic", "evaluate", "summary"]


@dataclass(frozen=True)
class Statistic:
    """A mean over videos, its standard error (NaN for one video), and the number of videos."""

    mean: float
    stderr: float
    n: int


def evaluate(
    videos: Sequence[Tensor],
    truths: Sequence[Tensor] | None,
    images: Sequence[Tensor],
    captions: Sequence[str],
    *,
    shapes: Sequence[str] | None = None,
    image_features: ImageFeatures | None = None,
    text_features: TextFeatures | None = None,
) -> list[dict[str, float]]:
    """Compute every metric of every video.

    Args:
        videos: generated, each `f 3 h w` in [-1, 1].
        truths: the real videos of the same prompts, of the same shapes, or None.
        images: image prompts, each `3 s s` in [-1, 1], the subject on white.
        captions: text prompts.
        shapes: the subjects' shapes by name, for the toy world.
        image_features, text_features: CLIP; without them there are no `clip_*` scores.

    Returns:
        For each video: `palette` (Delta E 2000, lower is better), `subject_found` (share of frames), `motion`
        (share of the range), with shapes `shape` (overlap with the best-fitting pose of that shape), `clip_i`,
        `clip_t`, `clip_consistency` (cosines), and with truths `psnr` (dB), `truth_palette` (the floor that
        segmentation and sampling leave) and `truth_motion`. A video of one
        frame has no metrics over pairs of frames.

    Raises:
        ValueError: the lists differ in length, a tensor has the wrong shape, or only one feature function is given.
    """
    lengths = {"videos": len(videos), "images": len(images), "captions": len(captions)}
    if truths is not None:
        lengths["truths"] = len(truths)
    if shapes is not None:
        lengths["shapes"] = len(shapes)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the lists differ in length: {lengths}; give one of each for every video")
    if (image_features is None) != (text_features is None):
        raise ValueError("image_features and text_features come together; give both, or neither")
    rows = [_pixel_scores(video, image) for video, image in zip(videos, images, strict=True)]
    for row, video, truth, image in zip(rows, videos, () if truths is None else truths, images, strict=False):
        row["psnr"] = psnr(video.cpu(), truth.cpu())
        scores = _pixel_scores(truth, image)
        row |= {f"truth_{name}": scores[name] for name in ("palette", "motion") if name in scores}
    for row, video, shape in zip(rows, videos, () if shapes is None else shapes, strict=False):
        row["shape"] = float(shape_overlaps(video.cpu(), shape).mean())
    if image_features is not None and text_features is not None:
        clip = clip_scores(videos, images, captions, image_features, text_features)
        for name, values in clip.items():
            for row, value in zip(rows, values, strict=True):
                if not math.isnan(value):
                    row[name] = value
    return rows


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Statistic]:
    """Return mean, standard error and count of every metric, over the videos that have it.

    Raises:
        ValueError: there are no videos.
    """
    if not rows:
        raise ValueError("rows is empty; evaluate at least one video")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _statistic(np.array([row[name] for row in rows if name in row])) for name in names}


def _pixel_scores(video: Tensor, image: Tensor) -> dict[str, float]:
    colour = video_palette_distance(video, image)
    scores = {"palette": colour.distance, "subject_found": colour.found}
    return scores | ({"motion": motion(video)} if len(video) > 1 else {})


def _statistic(values: np.ndarray) -> Statistic:
    n = len(values)
    known = n > 1 and bool(np.isfinite(values).all())
    return Statistic(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if known else math.nan, n)
