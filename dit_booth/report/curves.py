"""Plots of the scores behind the table: drift over the frames, and each prompt of the primary contrasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup

from dit_booth.evaluation import drift
from dit_booth.evaluation.scores import Score
from dit_booth.report.measures import Measure
from dit_booth.report.plots import CONTROL_NAMES, Plot, axis_label
from dit_booth.report.study import PointResult, Study
from dit_booth.report.svg import Axis, classes, element, frame, padded
from dit_booth.report.table import ResultRow, Table
from dit_booth.report.values import Array, frames_of, values_of
from dit_booth.study.statistics import CrossedEstimate, differences, estimate_mean, t_quantile

MAX_CURVES = 12
"""Metrics with a drift plot, at most."""
_DRIFTS: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
    "slope": ("Slope per frame", drift.slope),
    "last_minus_first": ("Last minus first quarter", drift.last_minus_first),
    "framepack": ("|First 15 % − last 15 %|", drift.framepack),  # noqa: RUF001
}


# ---- drift -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DriftTable:
    """Drift numbers of one metric: a row of estimates for each row of the table, floors and ceilings last."""

    metric: Measure
    columns: tuple[Measure, ...]
    rows: tuple[tuple[ResultRow, dict[str, CrossedEstimate]], ...]


@dataclass(frozen=True, eq=False)
class _Curve:
    row: ResultRow
    mean: Array
    half: Array


def drift_table(table: Table) -> DriftTable | None:
    """Return the drift of the first metric that has values per frame (the primary one, if it has); else None."""
    for metric in table.metrics:
        rows = [(row, _drifts(row, metric.name)) for row in (*table.rows, *table.controls)]
        if any(found for _, found in rows):
            finer = replace(metric, digits=metric.digits + 1)
            columns = tuple(replace(finer, name=key, label=label) for key, (label, _) in _DRIFTS.items())
            return DriftTable(metric=metric, columns=columns, rows=tuple((r, f) for r, f in rows if f))
    return None


def _drifts(row: ResultRow, metric: str) -> dict[str, CrossedEstimate]:
    found = {}
    for key, (_, function) in _DRIFTS.items():

        def of(score: Score, function: Callable[[Sequence[float]], float] = function) -> float:
            return function(score.value) if isinstance(score.value, tuple) else math.nan

        estimate = estimate_mean(values_of(row.points, metric, row.control, of))
        if estimate is not None:
            found[key] = estimate
    return found


def drift_plots(table: Table, styles: Mapping[str, int]) -> list[Plot]:
    """Return a plot over the frames for the metrics that have values per frame, the primary one first."""
    plots: list[Plot] = []
    for metric in table.metrics:
        found = [_curve(row, metric.name) for row in (*table.rows, *table.controls)]
        curves = [curve for curve in found if curve is not None]
        if curves and len(plots) < MAX_CURVES:
            plots.append(_drift_plot(metric, curves, styles))
    return plots


def _curve(row: ResultRow, metric: str) -> _Curve | None:
    """Return mean and 95 % interval over prompts of each frame; None with fewer than two frames."""
    values = frames_of(row.points, metric, row.control)
    known = ~np.isnan(values)
    if values.shape[1] < 2 or known.any(0).sum() < 2:
        return None
    count = known.sum(0)
    filled = np.where(known, values, 0.0)
    mean = np.divide(filled.sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)
    square = np.where(known, (values - mean) ** 2, 0.0).sum(0)
    spread = np.divide(square, (count - 1) * count, out=np.full(count.shape, np.nan), where=count > 1)
    return _Curve(row, mean, np.sqrt(spread) * [t_quantile(n - 1) for n in count])


def _drift_plot(metric: Measure, curves: Sequence[_Curve], styles: Mapping[str, int]) -> Plot:
    """Draw the rows with bands; floors and ceilings in grey, as far as they do not squash the rows."""
    own = [curve for curve in curves if not curve.row.control]
    low, high, shown = _extent(own or curves, [curve for curve in curves if curve.row.control])
    x = Axis(low=1, high=max(len(curve.mean) for curve in curves), start=62, end=510)
    y = Axis(low=low, high=high, start=310, end=34)
    parts = [frame(x, y, "frame", axis_label(metric), whole=True)]
    parts += [_band(curve, styles, x, y) for curve in own]
    parts += [_line(curve, styles, x, y) for curve in (*shown, *own)]
    parts += _end_names(shown, x, y)
    title = f"{metric.label} over the frames"
    svg = element("svg", *parts, viewBox="0 0 620 356", role="img", aria_label=title, class_="plot wide")
    outside = [
        f"{curve.row.label} {metric.text(float(np.nanmean(curve.mean)))}"
        for curve in curves
        if curve.row.control and curve not in shown
    ]
    return Plot(key=metric.name, svg=svg, note=f"Outside the frame: {'; '.join(outside)}." if outside else "")


def _extent(own: Sequence[_Curve], controls: Sequence[_Curve]) -> tuple[float, float, list[_Curve]]:
    """Return the ends of the axis, and the floors and ceilings that fit: at most 2.5 times what the rows need."""
    values = np.concatenate([np.concatenate([c.mean, c.mean - c.half, c.mean + c.half]) for c in own])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room, shown = 2.5 * (high - low), []
    for curve in sorted(controls, key=lambda c: abs(float(np.nanmean(c.mean)) - (low + high) / 2)):
        least, most = min(low, float(np.nanmin(curve.mean))), max(high, float(np.nanmax(curve.mean)))
        if most - least <= room:
            low, high = least, most
            shown.append(curve)
    return *padded([low, high]), shown


def _path(values: Array, x: Axis, y: Axis, way: int = 1) -> str:
    points = [(i + 1, min(max(float(v), y.low), y.high)) for i, v in enumerate(values) if np.isfinite(v)]
    return " L".join(f"{x(i):.1f},{y(v):.1f}" for i, v in points[::way])


def _band(curve: _Curve, styles: Mapping[str, int], x: Axis, y: Axis) -> Markup:
    low, high = _path(curve.mean - curve.half, x, y), _path(curve.mean + curve.half, x, y, -1)
    style = styles[curve.row.id]
    path = [element("path", d=f"M{low} L{high} Z", class_=f"band {classes(style)}")] if low else []
    return element("g", *path, data_g=str(style))


def _line(curve: _Curve, styles: Mapping[str, int], x: Axis, y: Axis) -> Markup:
    line = f"M{_path(curve.mean, x, y)}"
    known = curve.mean[np.isfinite(curve.mean)]
    tip = f"{curve.row.label}: {known[0]:.4g} to {known[-1]:.4g}"
    if curve.row.control:
        look = element("path", d=line, class_=f"floor floor-{curve.row.control}")
        return element("g", look, element("path", d=line, class_="hit"), data_g="", data_tip=tip)
    style = styles[curve.row.id]
    look = element("path", d=line, class_=f"line {classes(style)}")
    return element("g", look, element("path", d=line, class_="hit"), data_g=str(style), data_tip=tip)


def _end_names(curves: Sequence[_Curve], x: Axis, y: Axis) -> list[Markup]:
    """Write the names of floors and ceilings beside the ends of their lines, at least a line apart."""
    ends = [(y(float(curve.mean[np.isfinite(curve.mean)][-1])), curve.row.control) for curve in curves]
    if len({control for _, control in ends}) < len(ends):  # each row has its own: the tips tell them apart
        return []
    parts, last = [], -math.inf
    for at, control in sorted(ends):
        last = max(at, last + 13)
        name = CONTROL_NAMES[control]
        parts.append(element("text", name, x=x.end + 6, y=last + 4, text_anchor="start", class_="faint"))
    return parts


# ---- each prompt -------------------------------------------------------------------------------------------


def scatter_plots(study: Study, table: Table) -> list[Plot]:
    """Return a plot for every primary contrast: each prompt's mean over seeds, one variant against the other."""
    if table.contrasts is None:
        return []
    points = {group.label: group.finished for group in study.groups}
    found = (
        _scatter(table.contrasts.metric, c.ours, c.theirs, points.get(c.ours, ()), points.get(c.theirs, ()))
        for c in table.contrasts.results
    )
    return [plot for plot in found if plot]


def _scatter(
    metric: Measure, ours: str, theirs: str, left: Sequence[PointResult], right: Sequence[PointResult]
) -> Plot | None:
    """Draw `ours` (y) against `theirs` (x) on the seeds and prompts that both have; None if they share none."""
    a, b = values_of(left, metric.name), values_of(right, metric.name)
    both = differences(a, b)
    prompts = dict.fromkeys(p for row in both.values() for p in row)
    if not prompts:
        return None
    captions = {video.prompt: video.caption for point in (*left, *right) for video in point.samples.videos}
    across = [_mean([b[seed][p] for seed in both if p in both[seed]]) for p in prompts]
    up = [_mean([a[seed][p] for seed in both if p in both[seed]]) for p in prompts]
    low, high = padded([*across, *up])
    x, y = Axis(low=low, high=high, start=62, end=382), Axis(low=low, high=high, start=354, end=34)
    parts = [frame(x, y, theirs, f"{ours}: {axis_label(metric)}")]
    parts.append(element("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="truth"))
    for prompt, old, new in zip(prompts, across, up, strict=True):
        tip = f"{captions.get(prompt) or prompt}: {metric.text(old)} → {metric.text(new)}"
        dot = element("circle", cx=x(old), cy=y(new), r=4.0, class_="prompt")
        parts.append(element("g", dot, data_tip=tip))
    below = sum(new < old for old, new in zip(across, up, strict=True))
    above = sum(new > old for old, new in zip(across, up, strict=True))
    title = f"{metric.label} of each prompt, {ours} against {theirs}"
    svg = element("svg", *parts, viewBox="0 0 400 400", role="img", aria_label=title, class_="plot square")
    counts = f"{below} of {len(prompts)} prompts lie below the diagonal, {above} above"
    better = {1: " (better)", -1: " (worse)", 0: ""}[metric.better]
    return Plot(key=f"{ours} − {theirs}", svg=svg, note=f"{counts}{better}.")  # noqa: RUF001


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
