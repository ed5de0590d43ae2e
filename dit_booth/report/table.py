"""The table: a row per group and per floor or ceiling, metrics with intervals, costs, differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dit_booth.report.contrasts import Contrasts, compare
from dit_booth.report.measures import COST_LABELS, Measure, cost_column, metric_column, metric_columns
from dit_booth.report.study import COSTS, Group, PointResult, Study
from dit_booth.report.svg import DASH
from dit_booth.report.values import metrics_of, values_of
from dit_booth.study.statistics import CrossedEstimate, estimate_mean, paired_difference

_CONTROLS = {"shuffled": "{}, shuffled image", "none": "{}, no image"}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Metrics, costs and differences of a group, or of a floor or ceiling (`control`); missing metrics are absent."""

    id: str
    label: str
    points: tuple[PointResult, ...]
    group: Group | None = None
    control: str = ""
    quality: dict[str, CrossedEstimate] = field(default_factory=dict)
    seeds: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(seed, mean) pairs by metric."""
    costs: dict[str, float] = field(default_factory=dict)
    differences: dict[str, CrossedEstimate] = field(default_factory=dict)

    @property
    def prompts(self) -> str:
        """Return the number of prompts per seed, or its smallest and largest value."""
        counts = sorted({len(point.samples.prompts) for point in self.points})
        return DASH.join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "0"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows are the groups with a finished point; `controls` are floors and ceilings, scored like them.

    The `absent` are the groups without a finished point: they are listed with their status only.
    """

    metrics: tuple[Measure, ...]
    costs: tuple[Measure, ...]
    rows: tuple[ResultRow, ...]
    controls: tuple[ResultRow, ...]
    absent: tuple[Group, ...]
    baseline: ResultRow | None
    contrasts: Contrasts | None

    def best(self, metric: Measure) -> frozenset[str]:
        """Return the groups with the best mean, after rounding; empty if no direction is better, or all are equal."""
        means = {row.id: row.quality[metric.name].mean for row in self.rows if metric.name in row.quality}
        known = {group: mean for group, mean in means.items() if not math.isnan(mean)}
        if not metric.better or len({metric.text(mean) for mean in known.values()}) < 2:
            return frozenset()
        top = metric.text(max(known.values(), key=lambda mean: metric.better * mean))
        return frozenset(group for group, mean in known.items() if metric.text(mean) == top)

    @property
    def others(self) -> tuple[ResultRow, ...]:
        """Return the rows to compare with the baseline, floors and ceilings last."""
        if self.baseline is None:
            return ()
        return tuple(row for row in (*self.rows, *self.controls) if row.id != self.baseline.id)

    def mark(self, row: ResultRow, metric: Measure) -> str:
        """Return ``*`` where a tested contrast of the row and the baseline is significant; else nothing."""
        if self.contrasts is None or self.baseline is None or metric.name != self.contrasts.metric.name:
            return ""
        pair = {row.label, self.baseline.label}
        return next((c.mark for c in self.contrasts.results if {c.ours, c.theirs} == pair), "")


def make_table(study: Study, baseline: str = "") -> Table:
    """Make the table of a study; `baseline` is a row's label or id, or empty for the sweep's own.

    Raises:
        ValueError: no row has this label or id.
    """
    groups = [group for group in study.groups if group.finished]
    chosen = _baseline(groups, study.groups, baseline)
    names = metrics_of([point for group in groups for point in group.finished])
    rows = tuple(_row(group, chosen, names) for group in groups)
    primary = study.primary
    return Table(
        metrics=metric_columns(names, primary.metric if primary else ""),
        costs=tuple(
            cost_column(name, values)
            for name in COST_LABELS
            if (values := [row.costs[name] for row in rows if name in row.costs])
        ),
        rows=rows,
        controls=tuple(_control_rows(groups, chosen, names)),
        absent=tuple(group for group in study.groups if not group.finished),
        baseline=next((row for row in rows if row.group is chosen), None),
        contrasts=_contrasts(study),
    )


def _contrasts(study: Study) -> Contrasts | None:
    """Test the declared contrasts: those against the baseline refer to the sweep's own, whatever is shown."""
    if study.primary is None:
        return None
    own = next((group.label for group in study.groups if group.baseline), None)
    rows = {group.label: group.finished for group in study.groups}
    return compare(study.primary, metric_column(study.primary.metric), rows, own)


def _baseline(groups: Sequence[Group], every: Sequence[Group], name: str) -> Group | None:
    if not name:
        return next((group for group in groups if group.baseline), None)
    found = [group for group in every if name in (group.id, group.label)]
    if not found:
        raise ValueError(f"baseline is {name!r}; it must be one of: {', '.join(g.label for g in every)}")
    return found[0] if found[0] in groups else None


def _row(group: Group, baseline: Group | None, names: Sequence[str]) -> ResultRow:
    points = group.finished
    costs = {
        name: [p.costs[name] for p in points if not math.isnan(p.costs.get(name, math.nan))] for name in COSTS
    }
    row = ResultRow(
        id=group.id,
        label=group.label,
        points=points,
        group=group,
        costs={name: _mean(values) for name, values in costs.items() if values},
    )
    return _scored(row, None if baseline is group else baseline, names)


def _control_rows(
    groups: Sequence[Group], baseline: Group | None, names: Sequence[str]
) -> Iterable[ResultRow]:
    """Iterate over the ground truth, and over the floors of every group that has them."""
    truth: dict[int, PointResult] = {}
    for group in (*([baseline] if baseline else []), *groups):
        for point in group.finished:
            if any(control == "truth" for control, _ in point.samples.measured):
                truth.setdefault(point.seed, point)
    found = [("truth", "ground truth", tuple(truth.values()))]
    for control, label in _CONTROLS.items():
        for group in groups:
            points = tuple(p for p in group.finished if any(own == control for own, _ in p.samples.measured))
            found.append((control, label.format(group.label), points))
    for control, label, points in found:
        if points:
            row = ResultRow(id=f"{control}: {label}", label=label, points=points, control=control)
            yield _scored(row, baseline, names)


def _scored(row: ResultRow, baseline: Group | None, names: Sequence[str]) -> ResultRow:
    """Return the row with its estimates, and its differences to the baseline."""
    quality: dict[str, CrossedEstimate] = {}
    seeds: dict[str, list[tuple[int, float]]] = {}
    differences: dict[str, CrossedEstimate] = {}
    for name in names:
        values = values_of(row.points, name, row.control)
        estimate = estimate_mean(values)
        if estimate is None:
            continue
        quality[name] = estimate
        seeds[name] = [(seed, _mean(prompts.values())) for seed, prompts in values.items()]
        difference = paired_difference(values, values_of(baseline.finished, name)) if baseline else None
        if difference is not None:
            differences[name] = difference
    return replace(row, quality=quality, seeds=seeds, differences=differences)


def _mean(values: Iterable[float]) -> float:
    own = list(values)
    return sum(own) / len(own)
