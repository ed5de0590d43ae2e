"""Metrics of generated videos: `score` one video with scorers, `summary` over prompts.

    case.py        a video to score, and what it was to show
    catalogue.py   the metrics by name: unit, better direction, definition
    oracle/        the toy world: the exact renderer as the model, no learned network
    learned/       metrics of networks that the user has
    scores.py      scores.jsonl: every metric of every video, frame by frame
    folder.py      a folder of videos with its CSV file

Metrics work on tensors; networks are passed as functions that return features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dit_booth.evaluation.scores import Score

if TYPE_CHECKING:  # the catalogue and the scores need no PyTorch
    from dit_booth.evaluation.case import Case, Scorer

__all__ = ["Statistic", "score", "summary"]


@dataclass(frozen=True)
class Statistic:
    """A mean over prompts, its standard error (NaN for one prompt), and the number of prompts."""

    mean: float
    stderr: float
    n: int


def score(case: Case, scorers: Sequence[Scorer], *, seed: int = 0) -> list[Score]:
    """Compute every metric of a video; `seed`: the training seed to write beside it."""
    values = {name: value for scorer in scorers for name, value in scorer(case).items()}
    return [
        Score(
            metric=name,
            value=float(value) if np.ndim(value) == 0 else tuple(map(float, np.asarray(value))),
            prompt=case.prompt,
            seed=seed,
            noise_seed=case.noise_seed,
            control=case.control,
        )
        for name, value in values.items()
    ]


def summary(scores: Iterable[Score], control: str = "") -> dict[str, Statistic]:
    """Return mean, standard error and count of every metric over prompts, of one control's videos.

    A prompt's videos of several noise seeds count as one value, their mean; a video without a value is left out.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for one in scores:
        if one.control == control and not math.isnan(one.mean):
            values.setdefault(one.metric, {}).setdefault(one.prompt, []).append(one.mean)
    return {
        name: _statistic(np.array([np.mean(same) for same in by_prompt.values()]))
        for name, by_prompt in values.items()
    }


def _statistic(values: np.ndarray) -> Statistic:
    n = len(values)
    known = n > 1 and bool(np.isfinite(values).all())
    return Statistic(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if known else math.nan, n)
