"""Agreement of raters: Krippendorff's alpha, side bias, and what changes while a rater answers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dit_booth.human.crossed import Rate, estimate_rate, indicators
from dit_booth.human.exclude import Observation
from dit_booth.study.statistics import LEVEL, Estimate

Array = NDArray[np.float64]
_LEVELS = (0.0, 0.5, 1.0)
REPLICATES = 1000


@dataclass(frozen=True, kw_only=True)
class Alpha:
    """Krippendorff's alpha with its 95 % interval over pairs of videos (NaN where unknown)."""

    value: float
    low: float
    high: float
    units: int


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Second half of a rater's list minus the first, means over raters."""

    seconds_ratio: Estimate | None
    """Logarithm of the ratio of an answer's mean seconds."""
    ties: Estimate | None
    """Share of ties."""
    agreement: Estimate | None
    """Share of answers that are the others' majority."""


def estimate_alpha(own: Sequence[Observation], seed: int = 0) -> Alpha:
    """Estimate ordinal alpha (second preferred < tie < first preferred); its interval resamples pairs of videos.

    The order of two systems is arbitrary, and alpha would depend on it: each pair counts half in either order.
    """
    units: dict[object, list[float]] = defaultdict(list)
    for o in own:
        units[o.cell].append(o.value)
    tables = [coincidences(values, _LEVELS) for values in units.values() if len(values) > 1]
    tables = [(table + table[::-1, ::-1]) / 2 for table in tables]
    if not tables:
        return Alpha(value=math.nan, low=math.nan, high=math.nan, units=0)
    stack, n = np.stack(tables), len(tables)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=REPLICATES)
    drawn = [krippendorff(table) for table in np.tensordot(weights, stack, axes=1)]
    known = [value for value in drawn if not math.isnan(value)]
    ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if known else (math.nan, math.nan)
    return Alpha(value=krippendorff(stack.sum(0)), low=float(ends[0]), high=float(ends[1]), units=n)


def coincidences(values: Sequence[float], levels: Sequence[float]) -> Array:
    """Return the coincidence matrix of one unit: ordered pairs of its values, each with weight 1 / (count - 1)."""
    counts = np.array([values.count(level) for level in levels], dtype=np.float64)
    table: Array = (np.outer(counts, counts) - np.diag(counts)) / (len(values) - 1)
    return table


def krippendorff(table: Array, *, ordinal: bool = True) -> float:
    """Return alpha of a coincidence matrix with ordered levels; NaN if all values are equal.

    Source: Krippendorff, "Computing Krippendorff's alpha-reliability", 2011.
    """
    marginal = table.sum(0)
    total = marginal.sum()
    order = np.cumsum(marginal) - marginal / 2  # the middle rank of each level
    distance = (order[:, None] - order) ** 2 if ordinal else 1 - np.eye(len(table))
    expected = (np.outer(marginal, marginal) * distance).sum() / (total - 1)
    return float(1 - (table * distance).sum() / expected) if expected > 0 else math.nan


def side_rate(own: Sequence[Observation]) -> Rate | None:
    """Estimate the share of answers for the right side, a tie counting half; 0.5 without a bias.

    Sides are balanced, so preferences hardly move the mean, but they would be taken for noise without effects that
    change their sign with the side: of each pair of videos, and of each rater's taste in a pair of systems. Answers to
    one trial depend on each other: they are averaged.
    """
    trials: dict[tuple[str, int], list[Observation]] = defaultdict(list)
    for o in own:
        trials[o.rater, o.trial].append(o)
    looks = [found[0] for found in trials.values()]
    sign = np.array([[1.0 if o.swapped else -1.0] for o in looks])
    cells: list[object] = [o.cell for o in looks]
    tastes: list[object] = [(o.rater, o.first, o.second) for o in looks]
    rate = estimate_rate(
        [float(np.mean([o.right for o in found])) for found in trials.values()],
        [o.rater for o in looks],
        [o.prompt for o in looks],
        [indicators(kinds) * sign for kinds in (cells, tastes)] if looks else [],
    )
    return rate and replace(rate, answers=len(own))


def others_majority(own: Sequence[Observation]) -> list[float]:
    """Return for each observation the choice that most others made of its pair and question: 0, 1, or NaN if even."""
    total: dict[object, float] = defaultdict(float)
    for o in own:
        total[o.cell, o.question] += o.value - 0.5
    rest = [total[o.cell, o.question] - (o.value - 0.5) for o in own]
    return [math.nan if abs(r) < 1e-9 else float(r > 0) for r in rest]


def estimate_learning(own: Sequence[Observation], lengths: Mapping[str, int]) -> Learning:
    """Compare the halves of each rater's list; lengths: trials of each rater's list."""
    majority = others_majority(own)
    decided = [
        (o, float(o.value == m)) for o, m in zip(own, majority, strict=True) if o.value != 0.5 and m == m
    ]
    return Learning(
        seconds_ratio=_change([(o, o.seconds) for o in own], lengths, _log_ratio),
        ties=_change([(o, float(o.value == 0.5)) for o in own], lengths, lambda a, b: b - a),
        agreement=_change(decided, lengths, lambda a, b: b - a),
    )


def _log_ratio(first: float, second: float) -> float:
    return math.log(second / first) if first * second else math.nan


def _change(
    values: Sequence[tuple[Observation, float]],
    lengths: Mapping[str, int],
    change: Callable[[float, float], float],
) -> Estimate | None:
    """Return the mean over raters of the change from the first half to the second; None for fewer than two raters."""
    halves: dict[str, tuple[list[float], list[float]]] = {}
    for o, value in values:
        halves.setdefault(o.rater, ([], []))[2 * o.trial >= lengths[o.rater]].append(value)
    pairs = [(np.mean(a), np.mean(b)) for a, b in halves.values() if a and b]
    changes = [value for a, b in pairs if math.isfinite(value := change(float(a), float(b)))]
    if len(changes) < 2:
        return None
    stderr = float(np.std(changes, ddof=1) / math.sqrt(len(changes)))
    return Estimate(mean=float(np.mean(changes)), stderr=stderr, df=len(changes) - 1, over="raters")
