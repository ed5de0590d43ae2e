"""Means with 95 % intervals, and differences that are paired by seed and by prompt.

Two questions have two intervals: over seeds (would another training seed do the same, on these prompts?) and
over prompts (would other prompts do the same, with these trained models?).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

Over = Literal["seeds", "prompts"]
Scores = Mapping[int, Mapping[str, float]]
"""One metric of one row of the table: seed -> prompt -> value."""
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, half the width of its 95 % t-interval (NaN where unknown), and the `n` units that it is over."""

    mean: float
    half: float
    n: int
    over: Over

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """True if 0 lies outside the interval; false if there is no interval.

        False, too, for two values that are equal up to rounding: for a metric with few possible values (a share of a
        dozen prompts) this often happens by chance, and a width of zero does not measure how seeds differ.
        """
        by_chance = self.n < 3 and self.half <= 1e-9 * abs(self.mean)
        return abs(self.mean) > self.half and not by_chance  # false for NaN


@dataclass(frozen=True)
class Difference:
    """A row minus the baseline: over seeds where two or more are shared, over prompts where each has scores."""

    seeds: Estimate | None
    prompts: Estimate | None

    @property
    def mean(self) -> float:
        return self.main.mean

    @property
    def main(self) -> Estimate:
        """The estimate over seeds, which is stricter, if it exists; else the one over prompts."""
        main = self.seeds or self.prompts
        assert main is not None
        return main

    @property
    def mark(self) -> str:
        """``*``: the interval over seeds excludes 0; ``†``: only the one over prompts does; else nothing."""
        if self.seeds and self.seeds.excludes_zero:
            return "*"
        return "†" if self.prompts and self.prompts.excludes_zero else ""


def t_quantile(n: int) -> float:
    """Return the half width of the 95 % interval of a mean of `n` values, in standard errors."""
    return float(stdtrit(n - 1, (1 + LEVEL) / 2)) if n > 1 else math.nan


def t_interval(values: Iterable[float], over: Over) -> Estimate:
    """Return mean and 95 % Student t-interval; its width is NaN for a single value, or if one is not finite."""
    array = np.array(list(values), dtype=np.float64)
    assert len(array), "a mean needs a value"
    if len(array) == 1 or not np.isfinite(array).all():
        return Estimate(float(array.mean()), math.nan, len(array), over)
    return from_stderr(
        float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))), len(array), over
    )


def from_stderr(mean: float, stderr: float, n: int, over: Over) -> Estimate:
    """Return the 95 % Student t-interval, from a mean's standard error."""
    return Estimate(mean, t_quantile(n) * stderr, n, over)


def paired_difference(ours: Scores, baseline: Scores) -> Difference | None:
    """Return `ours` minus `baseline` on the seeds and prompts that both have; None if they share none.

    Over seeds: the mean difference over a seed's prompts is one value. Over prompts: the mean difference over a
    prompt's seeds is one value, so the seeds of a prompt never count as independent.
    """
    pairs = {
        seed: {p: ours[seed][p] - baseline[seed][p] for p in ours[seed] if p in baseline[seed]}
        for seed in ours
        if seed in baseline
    }
    pairs = {seed: row for seed, row in pairs.items() if row}
    if not pairs:
        return None
    prompts = dict.fromkeys(p for row in pairs.values() for p in row)
    by_prompt = [float(np.mean([row[p] for row in pairs.values() if p in row])) for p in prompts]
    by_seed = [float(np.mean(list(row.values()))) for row in pairs.values()]
    return Difference(
        t_interval(by_seed, "seeds") if len(pairs) > 1 else None, t_interval(by_prompt, "prompts")
    )
