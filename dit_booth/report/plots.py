"""The page's plots, as inline SVG: quality against cost, and loss curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dit_booth.report.measures import Measure
from dit_booth.report.read import stage_losses
from dit_booth.report.study import Group, StageResult, Study
from dit_booth.report.svg import (
    Axis,
    classes,
    element,
    frame,
    marker,
    padded,
    padded_log,
    text_width,
)
from dit_booth.report.table import ResultRow, Table

Array = NDArray[np.float64]
_SIDES = ((1, "start"), (-1, "end"))
CONTROL_NAMES = {"truth": "ground truth", "shuffled": "shuffled image", "none": "no image"}
_POINTS = 160  # of a curve, at most: more than a plot of this width can show


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot and its caption."""

    key: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _Dot:
    row: ResultRow
    style: int
    x: float  # pixels
    mean: float
    low: float
    high: float
    seeds: list[float]


def quality_plots(table: Table, styles: Mapping[str, int]) -> list[Plot]:
    """Return a plot for every metric and cost that two or more rows have."""
    return [
        _quality_plot(metric, cost, rows, styles, _levels(table, metric))
        for metric in table.metrics
        for cost in table.costs
        if len(rows := [row for row in table.rows if _has(row, metric, cost)]) > 1
    ]


def _levels(table: Table, metric: Measure) -> dict[str, float]:
    """Return label and mean of the ground truth and of the baseline's floors; of no one else's, if there are many."""
    found = [row for row in table.controls if metric.name in row.quality]
    if len(found) > 3:
        found = [row for row in found if row.control == "truth"]
    means = {CONTROL_NAMES[row.control]: row.quality[metric.name].mean for row in found}
    return {label: mean for label, mean in means.items() if math.isfinite(mean)}


def _has(row: ResultRow, metric: Measure, cost: Measure) -> bool:
    quality = row.quality.get(metric.name)
    return quality is not None and math.isfinite(quality.mean) and cost.name in row.costs


def _quality_plot(
    metric: Measure,
    cost: Measure,
    rows: Sequence[ResultRow],
    styles: Mapping[str, int],
    levels: Mapping[str, float],
) -> Plot:
    costs = [row.costs[cost.name] for row in rows]
    log = max(costs) > 10 * min(costs) > 0
    low, high = padded_log(costs, 0.12) if log else padded(costs, 0.12)
    x = Axis(low=low, high=high, start=62, end=600, log=log)
    dots = _dots(metric, cost, rows, styles, x)
    low, high, clipped = _extent(dots)
    y = Axis(low=low, high=high, start=310, end=34)
    unit = f" ({cost.unit})" if cost.unit else ""
    parts = [frame(x, y, f"{cost.label}{unit}{', log scale' if log else ''}", axis_label(metric), cost.scale)]
    inside = {label: level for label, level in levels.items() if low <= level <= high}
    parts += _level_lines(inside, x, y)
    for dot, label in zip(dots, _place_labels(dots, x, y), strict=True):
        tip = f"{dot.row.label}: {metric.text(dot.mean)} [{metric.text(dot.low)}, {metric.text(dot.high)}]"
        tip += f" at {cost.text(dot.row.costs[cost.name])} {cost.unit}".rstrip()
        body = [*_bar(dot, y), marker(dot.style, dot.x, y(dot.mean)), *label]
        parts.append(element("g", *body, data_g=str(dot.style), data_tip=tip))
    outside = [f"{label} {metric.text(level)}" for label, level in levels.items() if label not in inside]
    notes = ["Small dots: seeds." if any(len(dot.seeds) > 1 for dot in dots) else ""]
    notes += ["Arrow heads: the interval extends beyond the frame." if clipped else ""]
    notes += [f"Outside the frame: {', '.join(outside)}." if outside else ""]
    side_by_side = len({round(x(c)) for c in costs}) < len(costs)
    notes += ["Variants of equal cost are drawn side by side." if side_by_side else ""]
    title = f"{metric.label} against {cost.label.lower()}"
    svg = element("svg", *parts, viewBox="0 0 620 356", role="img", aria_label=title, class_="plot wide")
    return Plot(key=f"{metric.name}/{cost.name}", svg=svg, note=" ".join(filter(None, notes)))


def axis_label(metric: Measure) -> str:
    """Return a metric's axis label: its name, unit and better direction."""
    better = {1: ", higher is better", -1: ", lower is better", 0: ""}[metric.better]
    return f"{metric.label}{f' ({metric.unit})' if metric.unit else ''}{better}"


def _level_lines(levels: Mapping[str, float], x: Axis, y: Axis) -> list[Markup]:
    """Draw dashed lines of floors and ceilings; a name that would cover the one before moves to the left end."""
    parts: list[Markup] = []
    last = -math.inf
    for label, level in sorted(levels.items(), key=lambda item: y(item[1])):
        at, near = y(level), y(level) - last < 13
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="truth"))
        place, anchor = (x.start + 4, "start") if near else (x.end, "end")
        parts.append(element("text", label, x=place, y=at - 4, text_anchor=anchor, class_="faint"))
        last = at
    return parts


def _dots(
    metric: Measure, cost: Measure, rows: Sequence[ResultRow], styles: Mapping[str, int], x: Axis
) -> list[_Dot]:
    """Return rows as dots, from left to right; dots of equal cost are moved apart by their width."""
    placed: list[tuple[float, ResultRow]] = sorted(
        ((x(row.costs[cost.name]), row) for row in rows), key=lambda p: p[0]
    )
    dots: list[_Dot] = []
    at = 0
    while at < len(placed):
        cluster = [place for place in placed[at:] if place[0] - placed[at][0] < 6]
        for number, (pixel, row) in enumerate(cluster):
            quality = row.quality[metric.name]
            dots.append(
                _Dot(
                    row=row,
                    style=styles[row.id],
                    x=pixel + 13 * (number - (len(cluster) - 1) / 2),
                    mean=quality.mean,
                    low=quality.main.low,
                    high=quality.main.high,
                    seeds=[value for _, value in row.seeds[metric.name] if math.isfinite(value)],
                )
            )
        at += len(cluster)
    return dots


def _extent(dots: Sequence[_Dot]) -> tuple[float, float, bool]:
    """Return the ends of the quality axis, and whether intervals are clipped (those of two seeds are very wide)."""
    core = [value for dot in dots for value in (dot.mean, *dot.seeds)]
    ends = [value for dot in dots for value in (dot.low, dot.high) if not math.isnan(value)]
    span = max(core) - min(core)
    if ends and max([*core, *ends]) - min([*core, *ends]) <= 3.5 * span:
        return *padded([*core, *ends]), False
    low, high = padded(core, 0.3)
    return low, high, any(not low <= end <= high for end in ends)


def _bar(dot: _Dot, y: Axis) -> list[Markup]:
    """Draw the interval, with arrow heads where it leaves the plot, and the seeds as small dots."""
    style = classes(dot.style)
    parts = []
    if not math.isnan(dot.low):
        top, bottom = max(y(dot.high), y.end), min(y(dot.low), y.start)
        parts.append(element("line", x1=dot.x, x2=dot.x, y1=top, y2=bottom, class_=f"bar {style}"))
        for edge, cut, way in ((top, y(dot.high) < y.end, 1), (bottom, y(dot.low) > y.start, -1)):
            if cut:
                left, right, behind = dot.x - 3.5, dot.x + 3.5, edge + 5 * way
                head = f"M{left:.1f},{behind:.1f} L{dot.x:.1f},{edge:.1f} L{right:.1f},{behind:.1f}"
                parts.append(element("path", d=head, class_=f"bar {style}"))
            else:
                parts.append(
                    element("line", x1=dot.x - 4, x2=dot.x + 4, y1=edge, y2=edge, class_=f"bar {style}")
                )
    if len(dot.seeds) > 1:
        parts += [element("circle", cx=dot.x, cy=y(v), r=2.2, class_=f"seed {style}") for v in dot.seeds]
    return parts


def _place_labels(dots: Sequence[_Dot], x: Axis, y: Axis) -> list[list[Markup]]:
    """Place each dot's name beside it without overlap; a name that has no room is only in the legend."""
    taken = [(dot.x - 7, y(dot.mean) - 7, dot.x + 7, y(dot.mean) + 7) for dot in dots]
    for dot in dots:
        if not math.isnan(dot.low):
            taken.append((dot.x - 4, max(y(dot.high), y.end), dot.x + 4, min(y(dot.low), y.start)))
    labels: list[list[Markup]] = []
    for dot in dots:
        name = dot.row.label
        width, middle = text_width(name), y(dot.mean)
        above = min(middle, y(dot.high)) if not math.isnan(dot.high) else middle
        places = [(side * 10, middle + dy, anchor) for dy in (4, -9, 17) for side, anchor in _SIDES]
        for dx, base, anchor in [*places, (0, max(above, y.end) - 9, "middle")]:
            left = dot.x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = (left, base - 10, left + width, base + 3)
            inside = box[0] >= x.start and box[2] <= x.end + 14 and box[1] >= y.end - 12 and box[3] <= y.start
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                labels.append(
                    [element("text", name, x=dot.x + dx, y=base, text_anchor=anchor, class_="name")]
                )
                break
        else:
            labels.append([])
    return labels


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """The smoothed losses of one stage in some groups: mean and range over its trainings (seeds)."""

    groups: tuple[Group, ...]
    steps: Array
    mean: Array
    low: Array
    high: Array
    trainings: int
    window: int


def loss_plots(study: Study, styles: Mapping[str, int]) -> list[Plot]:
    """Return a plot for every stage; a training that points share is drawn once."""
    groups = [group for group in study.groups if group.finished] or list(study.groups)
    names = dict.fromkeys(stage.name for point in study.points for stage in point.stages)
    found = ((name, _curves(study, groups, name)) for name in names)
    return [_loss_plot(name, curves, styles, len(groups)) for name, curves in found if curves]


def _curves(study: Study, groups: Sequence[Group], name: str) -> list[_Curve]:
    """Return the curves of a stage: trainings that the same groups use are the seeds of one curve.

    Trainings of unfinished points would shorten the others, so they are used only if a group has no other.
    """
    users: dict[str, list[Group]] = {}
    losses: dict[str, list[tuple[int, float]]] = {}
    for group in groups:
        for point in group.points:
            for stage in (s for s in point.stages if s.name == name):
                training = _training(stage, point.id)
                if point.finished or not group.finished:
                    losses[training] = losses.get(training) or stage_losses(study, point, stage)
                if group not in users.setdefault(training, []):
                    users[training].append(group)
    together: dict[tuple[str, ...], list[str]] = {}
    for training, own in users.items():
        if len(losses.get(training, ())) > 1:
            together.setdefault(tuple(group.id for group in own), []).append(training)
    return [_curve(users[same[0]], [losses[training] for training in same]) for same in together.values()]


def _training(stage: StageResult, point: str) -> str:
    return f"{stage.name}-{stage.address}" if stage.address else f"{stage.name} of {point}"


def _curve(groups: Sequence[Group], trainings: Sequence[Sequence[tuple[int, float]]]) -> _Curve:
    length = min(len(training) for training in trainings)
    window = max(1, length // 10)
    steps = np.array([step for step, _ in trainings[0][:length]], dtype=np.float64)
    smooth = np.stack([_smooth(np.array([loss for _, loss in t[:length]]), window) for t in trainings])
    shown = np.unique(np.linspace(0, length - 1, min(length, _POINTS)).round().astype(int))
    return _Curve(
        groups=tuple(groups),
        steps=steps[shown],
        mean=smooth.mean(0)[shown],
        low=smooth.min(0)[shown],
        high=smooth.max(0)[shown],
        trainings=len(trainings),
        window=window,
    )


def _smooth(values: Array, window: int) -> Array:
    """Return the centered moving average; at the ends, over the part of the window that exists."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _loss_plot(name: str, curves: Sequence[_Curve], styles: Mapping[str, int], groups: int) -> Plot:
    means = np.concatenate([curve.mean[np.isfinite(curve.mean)] for curve in curves])
    bands = np.concatenate(
        [values[np.isfinite(values)] for curve in curves for values in (curve.low, curve.high)]
    )
    if not len(means):
        return Plot(key=name, svg=Markup(""), note=f"{name}: every loss is NaN or infinite.")
    log = float(means.min()) > 0 and float(means.max()) > 6 * float(means.min())
    low, high = padded_log(list(means)) if log else padded(list(bands))
    ends = [float(curve.steps[-1]) for curve in curves]
    x = Axis(low=min(float(curve.steps[0]) for curve in curves), high=max(max(ends), 2.0), start=58, end=450)
    y = Axis(low=low, high=high, start=230, end=34, log=log)
    parts = [frame(x, y, "step", f"loss, {name} stage{', log scale' if log else ''}")]
    for curve in curves:
        parts.append(_curve_lines(curve, styles, x, y))
    svg = element(
        "svg", *parts, viewBox="0 0 462 276", role="img", aria_label=f"loss of stage {name}", class_="plot"
    )
    return Plot(key=name, svg=svg, note=_loss_note(curves, groups))


def _curve_lines(curve: _Curve, styles: Mapping[str, int], x: Axis, y: Axis) -> Markup:
    shared = len(curve.groups) > 1
    style = "shared" if shared else classes(styles[curve.groups[0].id])

    def path(values: Array, way: int = 1) -> str:
        points = [
            (s, min(max(v, y.low), y.high))
            for s, v in zip(curve.steps, values, strict=True)
            if np.isfinite(v)
        ]
        return " L".join(f"{x(float(s)):.1f},{y(float(v)):.1f}" for s, v in points[::way])

    parts = []
    if curve.trainings > 1:
        parts.append(
            element("path", d=f"M{path(curve.low)} L{path(curve.high, -1)} Z", class_=f"band {style}")
        )
    line = path(curve.mean)
    parts.append(element("path", d=f"M{line}", class_=f"line {style}"))
    tip = ", ".join(group.label for group in curve.groups)
    tip += f": {curve.mean[-1]:.4g} at step {curve.steps[-1]:.0f}"
    hit = element("path", d=f"M{line}", class_="hit")
    own = " ".join(str(styles[group.id]) for group in curve.groups if group.id in styles)
    return element("g", *parts, hit, data_g=own, data_tip=tip)


def _loss_note(curves: Sequence[_Curve], groups: int) -> str:
    notes = []
    for curve in curves:
        if len(curve.groups) > 1:
            who = "all variants" if len(curve.groups) >= groups else "; ".join(g.label for g in curve.groups)
            notes.append(f"Grey: one training per seed, shared by {who}.")
    windows = sorted({curve.window for curve in curves})
    if windows[-1] > 1:
        least, most = windows[0], windows[-1]
        notes.append(f"Moving average over {least if least == most else f'{least} to {most}'} steps.")
    if any(curve.trainings > 1 for curve in curves):
        notes.append("Line: mean over seeds; band: their range.")
    return " ".join(notes)
