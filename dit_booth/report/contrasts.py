"""The primary contrasts of a sweep, tested with Holm's correction: the only differences that a page may mark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_booth.report.measures import Measure
from dit_booth.report.study import PointResult
from dit_booth.report.values import values_of
from dit_booth.study.primary import Primary
from dit_booth.study.statistics import (
    LEVEL,
    MIN_SEEDS,
    CrossedEstimate,
    equivalence,
    holm,
    non_inferiority,
    paired_difference,
)


@dataclass(frozen=True, kw_only=True)
class ContrastResult:
    """One contrast, `ours` minus `theirs`; p-values are adjusted by Holm's method over all contrasts.

    `difference` is None if the rows share no seed and prompt; `p_margin` and `p_equivalent` are NaN without a margin.
    """

    ours: str
    theirs: str
    difference: CrossedEstimate | None
    p: float = math.nan
    p_margin: float = math.nan
    p_equivalent: float = math.nan
    verdict: str = ""

    @property
    def exploratory(self) -> bool:
        return self.difference is None or self.difference.exploratory

    @property
    def mark(self) -> str:
        """Return ``*`` for a significant difference; nothing below the least number of seeds."""
        return "*" if not self.exploratory and self.p < 1 - LEVEL else ""


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """All primary contrasts of a sweep, on one metric."""

    metric: Measure
    margin: float | None
    results: tuple[ContrastResult, ...]

    @property
    def exploratory(self) -> bool:
        """True if no contrast has enough seeds for a test."""
        return all(result.exploratory for result in self.results)


def compare(
    primary: Primary, metric: Measure, rows: Mapping[str, Sequence[PointResult]], baseline: str | None
) -> Contrasts:
    """Test the contrasts; `rows` are the points of each label, `baseline` is the label of the baseline's row."""
    pairs = primary.pairs(list(rows), baseline)
    values = {label: values_of(points, metric.name) for label, points in rows.items()}
    found = [paired_difference(values.get(ours, {}), values.get(theirs, {})) for ours, theirs in pairs]
    mains = [difference.main if difference else None for difference in found]
    ps = holm([main.p if main else math.nan for main in mains])
    nothing = [math.nan] * len(pairs)
    worse, same = nothing, nothing
    if primary.margin is not None:
        margin = primary.margin
        if metric.better:
            worse = holm([non_inferiority(m, margin, metric.better) if m else math.nan for m in mains])
        same = holm([equivalence(m, margin) if m else math.nan for m in mains])
    results = tuple(
        ContrastResult(
            ours=ours,
            theirs=theirs,
            difference=difference,
            p=p,
            p_margin=p_margin,
            p_equivalent=p_equivalent,
            verdict=_verdict(difference, metric, p, primary.margin, p_margin, p_equivalent),
        )
        for (ours, theirs), difference, p, p_margin, p_equivalent in zip(
            pairs, found, ps, worse, same, strict=True
        )
    )
    return Contrasts(metric=metric, margin=primary.margin, results=results)


def _verdict(
    difference: CrossedEstimate | None,
    metric: Measure,
    p: float,
    margin: float | None,
    p_margin: float,
    p_equivalent: float,
) -> str:
    """Return the conclusion in words."""
    if difference is None:
        return "not measured: no seed and prompt in common"
    if difference.exploratory:
        seeds = f"{difference.seeds} training seed{'s' if difference.seeds > 1 else ''}"
        return f"exploratory: {seeds} of the {MIN_SEEDS} that a test needs"
    if math.isnan(p):
        return "not tested: no interval"
    level = 1 - LEVEL
    way = metric.better * (1 if difference.mean > 0 else -1)
    said = {1: "better", -1: "worse", 0: "different"}[way] if p < level else "no difference shown"
    if margin is None:
        return said
    within = f"{margin:g} {metric.unit}".rstrip()
    if p_equivalent < level:
        return f"{said}; equivalent within ±{within}"
    if not metric.better:
        return f"{said}; equivalence within ±{within} not shown"
    return f"{said}; {'non-inferior' if p_margin < level else 'non-inferiority not shown'} (margin {within})"
