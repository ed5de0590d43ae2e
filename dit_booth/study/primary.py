"""A sweep's primary question: one metric, and the contrasts that are tested on it. Everything else is descriptive.

primary:
  metric: appearance
  contrasts: baseline                       # every row against the baseline, or pairs of labels:
  # contrasts: [[two stages, unified], [two stages, fine only]]
  margin: 0.5                               # optional: also tests "not worse by 0.5 or more"
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from dit_booth.errors import suggest

Contrast = tuple[str, str]
"""Two labels; the difference is the first one's value minus the second one's."""
BASELINE: Literal["baseline"] = "baseline"


@dataclass(frozen=True, kw_only=True)
class Primary:
    """The metric and the contrasts; with a `margin` (in the metric's unit) also non-inferiority is tested."""

    metric: str
    contrasts: tuple[Contrast, ...] | Literal["baseline"] = BASELINE
    margin: float | None = None

    def pairs(self, labels: Sequence[str], baseline: str | None) -> list[Contrast]:
        """Return the contrasts as pairs of labels; against the baseline, one for every other label in order."""
        if self.contrasts != BASELINE:
            return list(self.contrasts)
        return [(label, baseline) for label in labels if label != baseline] if baseline is not None else []


def read_primary(value: object, where: str) -> Primary | None:
    """Read the section ``primary``; None if there is none. ValueError: a key, the metric or a value is wrong."""
    if value is None:
        return None
    known = [field.name for field in fields(Primary)]
    if not isinstance(value, dict):
        raise ValueError(
            f"{where}: primary is {value!r}; write metric, contrasts and, if wanted, margin under it"
        )
    for key in value:
        if key not in known:
            raise ValueError(f"{where}: {key!r} is no key of primary{suggest(str(key), known)}")
    return Primary(
        metric=_metric(value.get("metric"), where),
        contrasts=_contrasts(value.get("contrasts", BASELINE), where),
        margin=_margin(value.get("margin"), where),
    )


def check_labels(primary: Primary, labels: Collection[str], baseline: object, where: str) -> None:
    """Raise ValueError if a contrast names no point, or the baseline is asked for and there is none."""
    if primary.contrasts == BASELINE:
        if baseline is None:
            raise ValueError(
                f"{where}: primary.contrasts is baseline, and the sweep has none; add baseline, or list pairs of labels"
            )
        return
    for label in dict.fromkeys(label for pair in primary.contrasts for label in pair):
        if label not in labels:
            listed = ", ".join(map(repr, labels))
            raise ValueError(
                f"{where}: primary.contrasts names {label!r}, which is no point{suggest(label, labels)}; points are"
                f" {listed}"
            )


def _metric(metric: object, where: str) -> str:
    from dit_booth.evaluation.catalogue import CATALOGUE

    if not isinstance(metric, str) or metric not in CATALOGUE:
        near = suggest(str(metric), list(CATALOGUE)) or f"; metrics are {', '.join(CATALOGUE)}"
        raise ValueError(f"{where}: primary.metric is {metric!r}, which is no metric{near}")
    return metric


def _contrasts(value: object, where: str) -> tuple[Contrast, ...] | Literal["baseline"]:
    if value == BASELINE:
        return BASELINE
    advice = "write baseline, or a list of pairs of labels such as [[fine only, two stages]]"
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: primary.contrasts is {value!r}; {advice}")
    pairs: list[Contrast] = []
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or str(pair[0]) == str(pair[1]):
            raise ValueError(f"{where}: primary.contrasts has {pair!r}; {advice}")
        contrast = (str(pair[0]), str(pair[1]))
        if contrast in pairs or contrast[::-1] in pairs:
            raise ValueError(
                f"{where}: primary.contrasts compares {pair[0]!r} and {pair[1]!r} twice; leave one out"
            )
        pairs.append(contrast)
    return tuple(pairs)


def _margin(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: primary.margin is {value!r}; give a positive number in the metric's unit")
    return float(value)
