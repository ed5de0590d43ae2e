"""Columns of the table: metrics as the catalogue describes them, and costs in units that suit their values."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from dit_booth.evaluation.catalogue import CATALOGUE, Metric, describe
from dit_booth.report.svg import DASH, MINUS, si_prefix, with_prefix

MOTION = "speed"
"""The metric that stands beside consistency: a still video is perfectly consistent."""
COST_LABELS = {  # wall time is in the CSV only: a stage that points share is in that of one of them
    "trained_parameters": ("Trained params", ""),
    "flops_per_step": ("FLOPs per step", ""),
    "step_seconds": ("Step time", "s"),
    "peak_memory_mib": ("Peak memory", "MiB"),
    "train_flops": ("Training FLOPs", ""),
    "train_seconds": ("Training time", "s"),
    # of a comparison at one budget per subject (dit-booth compare)
    "tuning_free": ("Tuning-free", ""),
    "subject_flops": ("FLOPs per subject", ""),
    "subject_seconds": ("Time per subject", "s"),
    "subject_bytes": ("Stored bytes per subject", ""),
    "shared_flops": ("Training FLOPs before any subject", ""),
}


@dataclass(frozen=True, kw_only=True)
class Measure(Metric):
    """A column: a metric or a cost, and how its values are written."""

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

    @property
    def consistency(self) -> bool:
        """True for a similarity of consecutive frames, which a still video wins."""
        return self.name.endswith("_consistency")


def metric_column(name: str) -> Measure:
    """Return the column of a metric, as the catalogue describes it."""
    metric = describe(name)
    return Measure(**{**asdict(metric), "label": metric.label[:1].upper() + metric.label[1:]})


def metric_columns(names: Collection[str], primary: str = "") -> tuple[Measure, ...]:
    """Return columns of what was measured: the primary metric, the catalogue's in its order, then unknown ones.

    Consistency stands directly before motion.
    """
    known = [name for name in CATALOGUE if name in names]
    ordered = [*known, *(name for name in names if name not in CATALOGUE)]
    first = [name for name in ordered if name == primary]
    rest = [metric_column(name) for name in ordered if name != primary]
    beside = [m for m in rest if m.consistency]
    others = [m for m in rest if not m.consistency]
    at = next((i for i, m in enumerate(others) if m.name == MOTION), len(others))
    return (*map(metric_column, first), *others[:at], *beside, *others[at:])


def cost_column(name: str, values: Sequence[float]) -> Measure:
    """Return a cost column in a unit that suits its largest value."""
    label, unit = COST_LABELS[name]
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
    better = 1 if name == "tuning_free" else -1
    return Measure(name=name, label=label, unit=unit or prefix, better=better, digits=digits, scale=scale)
