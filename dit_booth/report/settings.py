"""Compare settings: those that differ between rows, and those that all points share."""

from __future__ import annotations

from dataclasses import dataclass

from dit_booth.report.study import PLACES, Group, Study
from dit_booth.report.svg import DASH


@dataclass(frozen=True, kw_only=True)
class SettingsComparison:
    """Settings by name, as text; `swept` and `following` have a value for each group."""

    swept: dict[str, tuple[str, ...]]
    following: dict[str, tuple[str, ...]]
    """Settings that were not swept but differ, because a swept option changes them."""
    by_seed: dict[str, str]
    """Settings that differ between the seeds of a row."""
    common: dict[str, str]


def compare_settings(study: Study) -> SettingsComparison:
    """Compare all points that have settings, finished or not."""
    points = [point for point in study.points if point.settings]
    names = dict.fromkeys(name for point in points for name in point.settings if name not in PLACES)
    swept = dict.fromkeys(name for group in study.groups for name in group.options)
    by_seed: dict[str, str] = {}
    following: dict[str, tuple[str, ...]] = {}
    common: dict[str, str] = {}
    for name in names:
        values = [point.settings.get(name) for point in points]
        if all(value == values[0] for value in values):
            common[name] = as_text(values[0])
        elif any(_vary(group, name) for group in study.groups):
            by_seed[name] = ", ".join(dict.fromkeys(as_text(value) for value in values))
        elif name not in swept:
            following[name] = tuple(_of_group(group, name) for group in study.groups)
    return SettingsComparison(
        swept={n: tuple(as_text(group.options.get(n)) for group in study.groups) for n in swept},
        following=following,
        by_seed=by_seed,
        common=common,
    )


def _vary(group: Group, name: str) -> bool:
    values = [point.settings.get(name) for point in group.points if point.settings]
    return any(value != values[0] for value in values)


def _of_group(group: Group, name: str) -> str:
    return next((as_text(point.settings.get(name)) for point in group.points if point.settings), DASH)


def as_text(value: object) -> str:
    """Return a setting's value as short text."""
    if value is None:
        return DASH
    if isinstance(value, (list, tuple)):
        return " ".join(map(as_text, value)) or "(empty)"
    return str(value) if value != "" else "(empty)"
