"""Means and paired differences with 95 % intervals over training seeds and prompts at once, and their tests.

A metric of one row of the table is a seeds x prompts table, after averaging over noise seeds. Seeds and prompts are
both samples: of the trainings and of the inputs that a claim is about. They are crossed random effects, with their
interaction (and the noise) as the residual:

    value[s, p] = mean + seed[s] + prompt[p] + residual[s, p]

The grand mean has the variance ``seed^2 / S + prompt^2 / P + residual^2 / (S P)``. The squared standard error of the S
seed means estimates the first and the third term, that of the P prompt means the second and the third. Their sum counts
the residual twice, so its mean square over S P is subtracted:

    SE^2 = SE_seed^2 + SE_prompt^2 - MS_residual / (S P),  at least max(SE_seed^2, SE_prompt^2)

For a complete table this is the REML estimate while all variance components are positive. Degrees of freedom are
Satterthwaite's (Biometrics Bulletin 2, 1946), for a linear combination of mean squares; where the lower bound holds,
those of the larger term. Of simulated nulls 3 to 6 % are rejected for five and more seeds and twelve and more prompts,
also with no seed effect or no prompt effect; 1 to 3 % if there is neither. Without the subtraction it is 2 to 4 % for
weak effects, where power is lost. With two to four seeds up to 11 % are rejected: hence `MIN_SEEDS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]
Over = Literal["seeds and prompts", "seeds", "prompts", "raters and prompts", "raters"]
Scores = Mapping[int, Mapping[str, float]]
"""One metric of one row of the table: seed -> prompt -> value."""
LEVEL = 0.95
MIN_SEEDS = 5
"""Training seeds below which an estimate is exploratory: nothing is marked as significant."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, its standard error (NaN where unknown) and degrees of freedom, and the units that it varies over."""

    mean: float
    stderr: float
    df: float
    over: Over

    @property
    def half(self) -> float:
        """Return half the width of the 95 % interval."""
        return t_quantile(self.df) * self.stderr

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def p(self) -> float:
        """Return the two-sided p-value of the null hypothesis that the true mean is 0."""
        return min(1.0, 2 * min(self.p_below(0.0), self.p_above(0.0))) if self.known else math.nan

    @property
    def known(self) -> bool:
        return math.isfinite(self.mean) and math.isfinite(self.stderr) and self.df > 0

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value for a true mean below `bound` (null hypothesis: at or above it)."""
        if not self.known:
            return math.nan
        distance = self.mean - bound
        if self.stderr <= 1e-12 * abs(self.mean):  # equal up to rounding
            return 0.0 if distance < 0 else 1.0
        return float(stdtr(self.df, distance / self.stderr))

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value for a true mean above `bound` (null hypothesis: at or below it)."""
        mirrored = Estimate(mean=-self.mean, stderr=self.stderr, df=self.df, over=self.over)
        return mirrored.p_below(-bound)


@dataclass(frozen=True, kw_only=True)
class CrossedEstimate:
    """A mean over seeds and prompts: `main` is the interval to report, the others are diagnostics.

    `by_seed` (other trainings, these prompts) and `by_prompt` (other prompts, these trainings) exist for two and more.
    """

    main: Estimate
    by_seed: Estimate | None
    by_prompt: Estimate | None
    seeds: int
    prompts: int

    @property
    def mean(self) -> float:
        return self.main.mean

    @property
    def exploratory(self) -> bool:
        """True with too few training seeds for a test."""
        return self.seeds < MIN_SEEDS


def t_quantile(df: float) -> float:
    """Return the half width of a 95 % interval in standard errors; NaN without degrees of freedom."""
    return float(stdtrit(df, (1 + LEVEL) / 2)) if df > 0 else math.nan


def estimate_mean(scores: Scores) -> CrossedEstimate | None:
    """Estimate the mean over seeds and prompts; None if no value is known."""
    return crossed(to_table(scores))


def paired_difference(ours: Scores, theirs: Scores) -> CrossedEstimate | None:
    """Estimate `ours` minus `theirs` on the seeds and prompts that both have; None if they share none."""
    return crossed(to_table(differences(ours, theirs)))


def differences(ours: Scores, theirs: Scores) -> Scores:
    """Return `ours` minus `theirs` for every seed and prompt that both have."""
    return {
        seed: {p: row[p] - theirs[seed][p] for p in row if p in theirs[seed]}
        for seed, row in ours.items()
        if seed in theirs
    }


def to_table(scores: Scores) -> Array:
    """Return the values as seeds x prompts, NaN where a cell is missing."""
    prompts = {p: column for column, p in enumerate(dict.fromkeys(p for row in scores.values() for p in row))}
    table = np.full((len(scores), len(prompts)), np.nan)
    for line, row in enumerate(scores.values()):
        for p, value in row.items():
            table[line, prompts[p]] = value
    return table


def crossed(table: Array) -> CrossedEstimate | None:
    """Estimate the mean of a seeds x prompts table with crossed random effects (module docstring).

    Missing cells (NaN) are filled by the additive model of seeds and prompts that fits the others best, so that a
    missing prompt does not shift its seed's mean; the residual has as many degrees of freedom fewer. If the
    known cells do not link all seeds (each has prompts of its own), means of the known cells are taken and nothing
    is subtracted, which is conservative.
    """
    known = ~np.isnan(table)
    table = table[known.any(1)][:, known.any(0)]
    if not table.size:
        return None
    seeds, prompts = table.shape
    if not np.isfinite(table[~np.isnan(table)]).all():  # a PSNR may be infinite
        mean = float(np.nanmean(table))
        main = Estimate(mean=mean, stderr=math.nan, df=0, over="seeds and prompts")
        return CrossedEstimate(main=main, by_seed=None, by_prompt=None, seeds=seeds, prompts=prompts)
    filled, free = fill(table)
    rows, columns = (np.nanmean(table, axis) if filled is None else filled.mean(axis) for axis in (1, 0))
    by_seed = _over(rows, "seeds") if seeds > 1 else None
    by_prompt = _over(columns, "prompts") if prompts > 1 else None
    main = by_seed or by_prompt or Estimate(mean=float(rows[0]), stderr=math.nan, df=0, over="prompts")
    if by_seed and by_prompt:
        residual = 0.0 if filled is None or not free else float(residual_square(filled, free))
        stderr, df = combine(by_seed.stderr**2, by_prompt.stderr**2, residual, seeds - 1, prompts - 1, free)
        main = Estimate(mean=by_seed.mean, stderr=float(stderr), df=float(df), over="seeds and prompts")
    return CrossedEstimate(main=main, by_seed=by_seed, by_prompt=by_prompt, seeds=seeds, prompts=prompts)


def residual_square(table: Array, free: int) -> Array:
    """Return the mean square of the residual over the number of cells, for tables ``... S P`` without gaps."""
    rows, columns = table.mean(-1, keepdims=True), table.mean(-2, keepdims=True)
    parts = table - rows - columns + table.mean((-2, -1), keepdims=True)
    square: Array = (parts**2).mean((-2, -1)) / free
    return square


def combine(
    seed: ArrayLike,
    prompt: ArrayLike,
    residual: ArrayLike,
    df_seed: float,
    df_prompt: float,
    df_residual: float,
) -> tuple[Array, Array]:
    """Return standard error and Satterthwaite degrees of freedom of a crossed mean.

    `seed` and `prompt` are the squared standard errors of the seed means and the prompt means, `residual` is the
    residual's mean square over the number of cells; arrays of any common shape.
    """
    seed, prompt, residual = (np.asarray(x, dtype=np.float64) for x in (seed, prompt, residual))
    total, larger = seed + prompt - residual, np.maximum(seed, prompt)
    spread = seed**2 / df_seed + prompt**2 / df_prompt + residual**2 / max(df_residual, 1)
    df = np.divide(total**2, spread, out=np.full_like(total, min(df_seed, df_prompt)), where=spread > 0)
    bounded = total <= larger
    df = np.where(bounded & (spread > 0), np.where(seed >= prompt, df_seed, df_prompt), df)
    return np.sqrt(np.maximum(total, larger)), df


def satterthwaite(parts: Sequence[ArrayLike], free: Sequence[float]) -> Array:
    """Return the degrees of freedom of a sum of variance estimates with `free` each; 0 where all are 0."""
    values = [np.asarray(part, dtype=np.float64) for part in parts]
    total = np.sum(values, axis=0)
    spread = np.sum([value**2 / df for value, df in zip(values, free, strict=True)], axis=0)
    degrees: Array = np.divide(total**2, spread, out=np.zeros_like(total), where=spread > 0)
    return degrees


def fill(table: Array) -> tuple[Array | None, int]:
    """Return the table with missing cells from the additive fit, and the residual's degrees of freedom.

    The table is None if the known cells do not link all rows.
    """
    known = ~np.isnan(table)
    seeds, prompts = table.shape
    free = int(known.sum()) - seeds - prompts + 1
    if known.all():
        return table, free
    values, weight = np.where(known, table, 0.0), known.astype(np.float64)
    counts = weight.sum(0)
    # Normal equations of the additive model after eliminating the prompts' effects.
    normal = np.diag(weight.sum(1)) - (weight / counts) @ weight.T
    if np.linalg.matrix_rank(normal, tol=1e-9) < seeds - 1:
        return None, 0
    right = values.sum(1) - (weight / counts) @ values.sum(0)
    row = np.linalg.lstsq(normal, right, rcond=None)[0]
    column = (values.sum(0) - weight.T @ row) / counts
    return np.where(known, table, row[:, None] + column[None]), free


def _over(means: Array, over: Over) -> Estimate:
    """Estimate the mean of independent unit means: Student's t."""
    n = len(means)
    return Estimate(
        mean=float(means.mean()), stderr=float(means.std(ddof=1) / math.sqrt(n)), df=n - 1, over=over
    )


# ---- tests -------------------------------------------------------------------------------------------------


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm, Scand. J. Statist. 6, 1979).

    A NaN (a contrast that could not be tested) stays NaN and counts as one of the tests.
    """
    order = sorted(range(len(ps)), key=lambda i: math.inf if math.isnan(ps[i]) else ps[i])
    adjusted = [math.nan] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        if not math.isnan(ps[i]):
            largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
            adjusted[i] = largest
    return adjusted


def non_inferiority(difference: Estimate, margin: float, better: int) -> float:
    """Return the one-sided p-value for "not worse by `margin` or more"; `better` is +1 if higher is better, else -1."""
    assert margin > 0 and better in (1, -1)
    return difference.p_above(-margin) if better > 0 else difference.p_below(margin)


def equivalence(difference: Estimate, margin: float) -> float:
    """Return the p-value for a true difference within ±`margin`: two one-sided tests (Schuirmann, 1987)."""
    assert margin > 0
    lower, upper = difference.p_above(-margin), difference.p_below(margin)
    return math.nan if math.isnan(lower) else max(lower, upper)
