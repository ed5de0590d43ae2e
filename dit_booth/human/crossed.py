"""The mean of answers with crossed random effects, such as rater and prompt, by restricted maximum likelihood.

    value = mean + rater + prompt + ... + residual

Each rater sees some of the prompts only, so `study.statistics.crossed`, which wants nearly complete tables, is too wide
here: its intervals cover 98 to 100 % in tables a third full. statsmodels' MixedLM fits the same model, and does not
converge where a variance is zero, which is common; where it does, the two agree (a test). The interval is Student's,
with Satterthwaite's degrees of freedom over the parts of the mean's variance.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from dit_booth.study.statistics import LEVEL, Estimate, satterthwaite

Array = NDArray[np.float64]
_RATIO = (-9.0, 4.0)  # bounds of the log of a variance ratio


@dataclass(frozen=True, kw_only=True)
class Components:
    """The mean with its interval, and the variances of the effects and of the residual."""

    estimate: Estimate
    effects: tuple[float, ...]
    residual: float


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share in [0, 1] with its 95 % interval, and how much it rests on."""

    mean: float
    low: float
    high: float
    answers: int
    raters: int
    prompts: int

    @property
    def known(self) -> bool:
        return math.isfinite(self.low)


def indicators(levels: Sequence[Hashable]) -> Array:
    """Return an effect, `n levels`: 1 where a value has a level."""
    numbers = {level: number for number, level in enumerate(dict.fromkeys(levels))}
    return np.eye(len(numbers))[[numbers[level] for level in levels]]


def estimate_rate(
    values: Sequence[float],
    raters: Sequence[Hashable],
    prompts: Sequence[Hashable],
    others: Sequence[Array] = (),
) -> Rate | None:
    """Estimate the mean of values in [0, 1]; None without values. `others`: effects besides rater and prompt.

    If all values are 0, or all 1, the interval is Clopper and Pearson's for as many independent answers as there are
    raters or prompts, whichever is less.
    """
    if not values:
        return None
    sizes = {"answers": len(values), "raters": len(set(raters)), "prompts": len(set(prompts))}
    mean = sum(values) / len(values)
    if min(values) == max(values) and values[0] in (0.0, 1.0):
        bound = ((1 - LEVEL) / 2) ** (1 / min(sizes["raters"], sizes["prompts"]))
        low, high = (bound, 1.0) if values[0] else (0.0, 1 - bound)
        return Rate(mean=mean, low=low, high=high, **sizes)
    estimate = fit_components(values, [indicators(raters), indicators(prompts), *others]).estimate
    if not estimate.known:
        return Rate(mean=estimate.mean, low=math.nan, high=math.nan, **sizes)
    return Rate(mean=estimate.mean, low=max(0.0, estimate.low), high=min(1.0, estimate.high), **sizes)


def fit_components(values: Sequence[float], effects: Sequence[Array]) -> Components:
    """Fit the model to `n` values and effects `n levels`; an effect with one level only is left out."""
    y, n = np.asarray(values, dtype=np.float64), len(values)
    used = [number for number, effect in enumerate(effects) if effect.shape[1] > 1]
    design = [effects[number] for number in used]
    variances = np.zeros(len(effects))
    if n < 2 or not design or y.min() == y.max():
        unknown = Estimate(mean=float(y.mean()), stderr=math.nan, df=0, over="raters and prompts")
        return Components(estimate=unknown, effects=tuple(variances), residual=0.0)
    fit = _Reml(y, design)
    found = minimize(
        fit.deviance,
        np.full(len(design), -2.0),
        method="Nelder-Mead",
        bounds=[_RATIO] * len(design),
        options={"xatol": 0.05, "fatol": 1e-3},
    )
    weight, mean, square = fit.solve(found.x)
    residual = square / (n - 1)
    variances[used] = residual * np.exp(found.x) * (found.x > _RATIO[0] + 0.5)
    estimate = Estimate(
        mean=mean,
        stderr=math.sqrt(residual / weight),
        df=_degrees(design, variances[used], residual),
        over="raters and prompts",
    )
    return Components(estimate=estimate, effects=tuple(map(float, variances)), residual=float(residual))


def _degrees(design: Sequence[Array], variances: Array, residual: float) -> float:
    """Return Satterthwaite's degrees of freedom over the parts of the plain mean's variance."""
    n = len(design[0])
    parts = [v * float(((d.sum(0) / n) ** 2).sum()) for d, v in zip(design, variances, strict=True)]
    free = [d.shape[1] - 1 for d in design]
    return float(satterthwaite([*parts, residual / n], [*free, max([*free, n - sum(free) - 1])]))


class _Reml:
    """The restricted likelihood of variance ratios: V / residual = I + sum of ratio x Z Z' (Woodbury's identity)."""

    def __init__(self, y: Array, design: Sequence[Array]) -> None:
        self.sizes, self.n = [d.shape[1] for d in design], len(y)
        z = np.concatenate(design, axis=1)
        both = np.stack([np.ones_like(y), y], axis=1)
        self.zz, self.zb, self.bb = z.T @ z, z.T @ both, both.T @ both

    def _inner(self, logs: Array) -> tuple[Array, float]:
        """Return [1 y]' V^-1 [1 y], and log det V."""
        scale = np.repeat(np.exp(logs / 2), self.sizes)
        inner = np.eye(len(scale)) + scale[:, None] * self.zz * scale
        root = np.linalg.cholesky(inner)
        half = np.linalg.solve(root, scale[:, None] * self.zb)
        return self.bb - half.T @ half, 2 * float(np.log(np.diag(root)).sum())

    def solve(self, logs: Array) -> tuple[float, float, float]:
        """Return the mean's precision, the mean, and the weighted square of the residuals."""
        product, _ = self._inner(logs)
        mean = float(product[0, 1] / product[0, 0])
        return float(product[0, 0]), mean, float(product[1, 1] - mean * product[0, 1])

    def deviance(self, logs: Array) -> float:
        product, determinant = self._inner(logs)
        square = product[1, 1] - product[0, 1] ** 2 / product[0, 0]
        return float(determinant + math.log(product[0, 0]) + (self.n - 1) * math.log(max(square, 1e-300)))
