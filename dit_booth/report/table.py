"""The table: a row per group, its metrics with intervals, its cost, and its paired differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dit_booth.report.study import COSTS, Group, PointResult, Score, Study
from dit_booth.report.svg import DASH, MINUS, si_prefix, with_prefix
from dit_booth.study.statistics import Difference, Estimate, from_stderr, paired_difference, t_interval


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A column: name, unit, better direction (+1, -1, 0: neither) and number format."""

    name: str
    label: str
    unit: str = ""
    better: int = 0
    digits: int = 3
    scale: float = 1.0
    """The unit in the column's raw values: 1e6 where they are counts and the column shows millions.

    0: each value with its own SI prefix, where no common one suits them.
    """

    def text(self, value: float) -> str:
        """Format a value, as in the page and the LaTeX file."""
        if math.isnan(value):
            return DASH
        if math.isinf(value):
            return "∞" if value > 0 else f"{MINUS}∞"
        if not self.scale:
            return with_prefix(value)
        text = f"{value / self.scale:.{self.digits}f}"
        return text.replace("-", "" if float(text) == 0 else MINUS)

    def signed(self, value: float) -> str:
        """Format a difference, with its sign."""
        text = self.text(value)
        return f"+{text}" if value > 0 and any(digit in text for digit in "123456789∞") else text

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.better]


_METRICS = [
    Measure(name="palette", label="Palette", unit="ΔE", better=-1, digits=2),
    Measure(name="shape", label="Shape", unit="IoU", better=1),
    Measure(name="clip_i", label="CLIP-I", better=1),
    Measure(name="dino", label="DINO", better=1),
    Measure(name="clip_t", label="CLIP-T", better=1),
    Measure(name="clip_consistency", label="Consistency", better=1, digits=4),
    Measure(name="psnr", label="PSNR", unit="dB", better=1, digits=2),
    Measure(name="ssim", label="SSIM", better=1),
    Measure(name="lpips", label="LPIPS", better=-1),
    Measure(name="fvd", label="FVD", better=-1, digits=1),
    Measure(name="subject_found", label="Subject found", unit="share", better=1),
    Measure(name="motion", label="Motion", unit="share", digits=4),
]
_COSTS = {  # wall time is in the CSV only: a stage that points share is in that of one of them
    "trained_parameters": ("Trained params", ""),
    "flops_per_step": ("FLOPs per step", ""),
    "step_seconds": ("Step time", "s"),
    "peak_memory_mib": ("Peak memory", "MiB"),
    "train_flops": ("Training FLOPs", ""),
    "train_seconds": ("Training time", "s"),
}


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Metrics, costs and differences of a group; missing metrics are absent."""

    group: Group
    quality: dict[str, Estimate] = field(default_factory=dict)
    seeds: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(seed, mean) pairs by metric."""
    costs: dict[str, float] = field(default_factory=dict)
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def prompts(self) -> str:
        """Return the number of prompts per seed, or its smallest and largest value."""
        counts = sorted({score.n for point in self.group.finished for score in point.scores.values()})
        return DASH.join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "0"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows are the groups with a finished point; `truth` are the ground truth's own scores, where known.

    The `absent` are the others: they are listed with their status only.
    """

    metrics: tuple[Measure, ...]
    costs: tuple[Measure, ...]
    rows: tuple[ResultRow, ...]
    absent: tuple[Group, ...]
    baseline: ResultRow | None
    truth: dict[str, float]

    def best(self, metric: Measure) -> frozenset[str]:
        """Return the groups with the best mean, after rounding; empty if no direction is better, or all are equal."""
        means = {
            row.group.id: row.quality[metric.name].mean for row in self.rows if metric.name in row.quality
        }
        known = {group: mean for group, mean in means.items() if not math.isnan(mean)}
        if not metric.better or len({metric.text(mean) for mean in known.values()}) < 2:
            return frozenset()
        top = metric.text(max(known.values(), key=lambda mean: metric.better * mean))
        return frozenset(group for group, mean in known.items() if metric.text(mean) == top)

    @property
    def others(self) -> tuple[ResultRow, ...]:
        """Return the rows to compare with the baseline."""
        return tuple(row for row in self.rows if self.baseline and row.group.id != self.baseline.group.id)


def make_table(study: Study, baseline: str = "") -> Table:
    """Make the table of a study; `baseline` is a row's label or id, or empty for the sweep's own.

    Raises:
        ValueError: no row has this label or id.
    """
    groups = [group for group in study.groups if group.finished]
    chosen = _baseline(groups, study.groups, baseline)
    rows = tuple(_row(group, chosen) for group in groups)
    points = [point for group in groups for point in group.finished]
    names = dict.fromkeys(name for point in points for name in point.scores)
    return Table(
        metrics=_columns([name for name in names if not name.startswith("truth_")]),
        costs=tuple(
            _cost_column(name, values)
            for name in _COSTS
            if (values := [row.costs[name] for row in rows if name in row.costs])
        ),
        rows=rows,
        absent=tuple(group for group in study.groups if not group.finished),
        baseline=next((row for row in rows if row.group is chosen), None),
        truth={
            name.removeprefix("truth_"): _mean(p.scores[name].mean for p in points if name in p.scores)
            for name in names
            if name.startswith("truth_")
        },
    )


def _baseline(groups: Sequence[Group], every: Sequence[Group], name: str) -> Group | None:
    if not name:
        return next((group for group in groups if group.baseline), None)
    found = [group for group in every if name in (group.id, group.label)]
    if not found:
        raise ValueError(f"baseline is {name!r}; it must be one of: {', '.join(g.label for g in every)}")
    return found[0] if found[0] in groups else None


def _row(group: Group, baseline: Group | None) -> ResultRow:
    points = group.finished
    names = dict.fromkeys(name for point in points for name in point.scores)
    seeds = {n: [(p.seed, p.scores[n].mean) for p in points if n in p.scores] for n in names}
    costs = {
        name: [p.costs[name] for p in points if not math.isnan(p.costs.get(name, math.nan))] for name in COSTS
    }
    found = (
        {n: _difference(points, baseline.finished, n) for n in names} if baseline not in (None, group) else {}
    )
    return ResultRow(
        group=group,
        quality={n: _estimate([p.scores[n] for p in points if n in p.scores]) for n in names},
        seeds=seeds,
        costs={name: _mean(values) for name, values in costs.items() if values},
        differences={name: difference for name, difference in found.items() if difference},
    )


def _estimate(scores: Sequence[Score]) -> Estimate:
    """Estimate a mean over seeds, or over the prompts of a single seed."""
    if len(scores) == 1:
        return from_stderr(scores[0].mean, scores[0].stderr, scores[0].n, "prompts")
    return t_interval([score.mean for score in scores], "seeds")


def _difference(ours: Sequence[PointResult], baseline: Sequence[PointResult], name: str) -> Difference | None:
    """Return the difference paired by prompt where its scores are known, else by seed."""
    by_prompt = paired_difference(_by_prompt(ours, name), _by_prompt(baseline, name))
    if by_prompt:
        return by_prompt
    left, right = (
        {p.seed: {"": p.scores[name].mean} for p in points if name in p.scores} for points in (ours, baseline)
    )
    by_seed = paired_difference(left, right)
    return Difference(by_seed.seeds, None) if by_seed and by_seed.seeds else None


def _by_prompt(points: Sequence[PointResult], name: str) -> dict[int, dict[str, float]]:
    return {
        point.seed: {prompt.key: prompt.scores[name] for prompt in point.prompts if name in prompt.scores}
        for point in points
    }


def _columns(names: Sequence[str]) -> tuple[Measure, ...]:
    """Return columns: known metrics in their usual order, then the others, without a better direction."""
    known = [measure for measure in _METRICS if measure.name in names]
    others = set(names) - {measure.name for measure in known}
    return (*known, *(Measure(name=n, label=n.replace("_", " ")) for n in names if n in others))


def _cost_column(name: str, values: Sequence[float]) -> Measure:
    """Return a cost column in a unit that suits its largest value."""
    label, unit = _COSTS[name]
    largest = max(values)
    scale, prefix = (1.0, "") if unit else si_prefix(largest)
    if not unit and min((value for value in values if value), default=0) < 0.1 * scale:
        return Measure(name=name, label=label, better=-1, scale=0)
    if name == "train_seconds" and largest >= 120:
        scale, unit = (3600.0, "h") if largest >= 7200 else (60.0, "min")
    if name == "step_seconds" and largest < 0.1:
        scale, unit = 1e-3, "ms"
    shown = largest / scale
    digits = 0 if shown >= 1000 or (not unit and not prefix) else 1 if shown >= 100 else 2
    return Measure(name=name, label=label, unit=unit or prefix, better=-1, digits=digits, scale=scale)


def _mean(values: Iterable[float]) -> float:
    own = list(values)
    return sum(own) / len(own)
