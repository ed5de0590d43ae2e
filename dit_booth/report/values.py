"""Values of a row of the table: by training seed and prompt, and frame by frame."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dit_booth.evaluation.scores import Score
from dit_booth.report.study import PointResult, Study
from dit_booth.study.statistics import Scores

Array = NDArray[np.float64]


def values_of(
    points: Sequence[PointResult],
    metric: str,
    control: str = "",
    of: Callable[[Score], float] = lambda score: score.mean,
) -> Scores:
    """Return seed -> prompt -> value: `of` every score (its mean over frames), averaged over noise seeds.

    Prompts without a value are left out.
    """
    out: dict[int, dict[str, float]] = {}
    for point in points:
        for prompt, scores in point.samples.measured.get((control, metric), {}).items():
            known = [value for value in map(of, scores) if not math.isnan(value)]
            if known:
                out.setdefault(point.seed, {})[prompt] = math.fsum(known) / len(known)
    return out


def frames_of(points: Sequence[PointResult], metric: str, control: str = "") -> Array:
    """Return `prompt frame`: values frame by frame, averaged over seeds and noise seeds; NaN where none is known.

    Videos of fewer frames than the longest one are padded with NaN. Without values per frame: `0 0`.
    """
    by_prompt: dict[str, list[tuple[float, ...]]] = {}
    for point in points:
        for prompt, scores in point.samples.measured.get((control, metric), {}).items():
            by_prompt.setdefault(prompt, []).extend(s.value for s in scores if isinstance(s.value, tuple))
    by_prompt = {prompt: rows for prompt, rows in by_prompt.items() if rows}
    length = max((len(row) for rows in by_prompt.values() for row in rows), default=0)
    out = np.full((len(by_prompt), length), np.nan)
    for line, rows in enumerate(by_prompt.values()):
        padded = np.full((len(rows), length), np.nan)
        for number, row in enumerate(rows):
            padded[number, : len(row)] = row
        known = ~np.isnan(padded).all(0)
        out[line, known] = np.nanmean(padded[:, known], axis=0)
    return out


def metrics_of(points: Sequence[PointResult]) -> list[str]:
    """Return the metrics of the points' own videos, in the order of their files."""
    return list(
        dict.fromkeys(metric for p in points for control, metric in p.samples.measured if not control)
    )


def scores_of(study: Study) -> Iterator[Score]:
    """Iterate over the scores of all points, each with its point and training seed."""
    for point in study.points:
        for prompts in point.samples.measured.values():
            for scores in prompts.values():
                yield from (replace(score, point=point.id, seed=point.seed) for score in scores)
