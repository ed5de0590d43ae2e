"""Strengths of systems from pairs with ties: Bradley and Terry's model as Davidson extended it.

    P(i beats j) : P(tie) : P(j beats i) = exp((a_i - a_j) / 2) : nu : exp((a_j - a_i) / 2)

(Davidson, JASA 65, 1970). Strengths sum to 0. A weak normal prior keeps them finite where a system always wins; else
its effect is far below the standard error. The model has no effects of raters and prompts: its strengths are those of
the population's choices, averaged over both, and their standard errors come from the bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from einops import einsum, rearrange, repeat
from numpy.typing import NDArray

from dit_booth.human.exclude import Observation
from dit_booth.study.statistics import Estimate, satterthwaite

Array = NDArray[np.float64]
Pair = tuple[int, int]
_PRIOR = 0.01  # precision of strengths and log nu
_STEPS, _LONGEST, _CLOSE = 40, 2.0, 1e-6
REPLICATES = 400
_BLOCK = 100  # replicates at once


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """Each system's strength with its interval, and the tie parameter nu."""

    systems: tuple[Estimate, ...]
    ties: float


def fit_davidson(counts: Array, pairs: Sequence[Pair], systems: int) -> tuple[Array, Array]:
    """Fit the model by Newton's method to any number of tables at once.

    counts: `... pairs 3`: wins of the first, ties, wins of the second. Returns strengths `... systems` and nu `...`.
    """
    features = np.zeros((len(pairs), 3, systems + 1))
    for number, (first, second) in enumerate(pairs):
        features[number, 0, first] = features[number, 2, second] = 0.5
        features[number, 0, second] = features[number, 2, first] = -0.5
        features[number, 1, systems] = 1.0
    flat = rearrange(features, "p k d -> (p k) d")
    squares = rearrange(flat[:, :, None] * flat[:, None, :], "n d e -> n (d e)")
    x = np.zeros((*counts.shape[:-2], systems + 1))
    total = counts.sum(-1, keepdims=True)
    for _ in range(_STEPS):
        odds = np.exp(rearrange(x @ flat.T, "... (p k) -> ... p k", k=3))
        share = odds / odds.sum(-1, keepdims=True)
        slope = rearrange(counts - total * share, "... p k -> ... (p k)") @ flat - _PRIOR * x
        expected = einsum(share, features, "... p k, p k d -> ... p d")
        moment = rearrange(total * share, "... p k -> ... (p k)") @ squares
        moment = rearrange(moment, "... (d e) -> ... d e", d=systems + 1)
        curvature = moment - np.swapaxes(total * expected, -1, -2) @ expected + _PRIOR * np.eye(systems + 1)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        x = x + step / np.maximum(1, np.abs(step).max(-1, keepdims=True) / _LONGEST)
        if np.abs(step).max() < _CLOSE:
            break
    strengths = x[..., :systems]
    return strengths - strengths.mean(-1, keepdims=True), np.exp(x[..., systems])


def estimate_strengths(own: Sequence[Observation], systems: int, seed: int = 0) -> Strengths:
    """Estimate strengths with intervals over raters and prompts.

    Three bootstraps resample raters, prompts, and single answers. The variances over raters and over prompts both have
    the answers' own in them; what exceeds it is the part of raters, or of prompts. A bootstrap of both at once would
    count the answers' own three times (Owen, Annals of Applied Statistics 1, 2007).
    """
    pairs = sorted({(o.first, o.second) for o in own})
    choice = {1.0: 0, 0.5: 1, 0.0: 2}
    tables = np.zeros((len(own), len(pairs), 3))
    for number, o in enumerate(own):
        tables[number, pairs.index((o.first, o.second)), choice[o.value]] = 1
    strengths, ties = fit_davidson(tables.sum(0), pairs, systems)
    rng = np.random.default_rng(seed)
    units: list[Sequence[object]] = [[o.rater for o in own], [o.prompt for o in own], range(len(own))]
    grouped = [_group(tables, unit) for unit in units]
    by_rater, by_prompt, single = (_bootstrap(group, pairs, systems, rng) for group in grouped)
    parts = [np.maximum(0, by_rater - single), np.maximum(0, by_prompt - single), single]
    stderr, df = np.sqrt(sum(parts)), satterthwaite(parts, [max(1, len(group) - 1) for group in grouped])
    known = len(grouped[0]) > 1 and len(grouped[1]) > 1
    return Strengths(
        systems=tuple(
            Estimate(mean=float(a), stderr=float(e), df=float(d) if known else 0, over="raters and prompts")
            for a, e, d in zip(strengths, stderr, df, strict=True)
        ),
        ties=float(ties),
    )


def _group(tables: Array, units: Sequence[object]) -> Array:
    """Sum tables over the answers of each unit."""
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    out = np.zeros((len(numbers), *tables.shape[1:]))
    np.add.at(out, [numbers[unit] for unit in units], tables)
    return out


def _bootstrap(groups: Array, pairs: Sequence[Pair], systems: int, rng: np.random.Generator) -> Array:
    """Return the variance of each strength over samples of the units, corrected for their number."""
    units = len(groups)
    if units < 2:
        return np.zeros(systems)
    flat = rearrange(groups, "u p k -> u (p k)")
    found = []
    for _ in range(0, REPLICATES, _BLOCK):
        weights = rng.multinomial(units, repeat(np.array([1 / units]), "1 -> u", u=units), size=_BLOCK)
        counts = rearrange(weights @ flat, "b (p k) -> b p k", k=3)
        found.append(fit_davidson(counts, pairs, systems)[0])
    variance: Array = np.concatenate(found).var(0, ddof=1) * units / (units - 1)
    return variance
