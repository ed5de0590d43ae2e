"""The worst and the best videos of each point by one metric, as data URIs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from dit_booth.evaluation.folder import VideoRow
from dit_booth.report.measures import Measure
from dit_booth.report.samples import Cell, video_cell
from dit_booth.report.study import Group, PointResult
from dit_booth.report.table import Table

COUNT = 5
"""Videos at each end, at most; with fewer than ten prompts, half of them."""


@dataclass(frozen=True, kw_only=True)
class RankedVideo:
    """A video with its value and its caption."""

    cell: Cell
    value: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class ExtremeRow:
    """A point: its worst videos, the worst one first, and its best ones, the best one last."""

    group: Group
    seed: int
    worst: tuple[RankedVideo, ...]
    best: tuple[RankedVideo, ...]

    @property
    def size(self) -> int:
        """Return the number of characters in the page."""
        return sum(len(ranked.cell.uri) for ranked in (*self.worst, *self.best))


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """Rows by group and seed; `dropped` points did not fit into the page."""

    metric: Measure | None = None
    rows: tuple[ExtremeRow, ...] = ()
    dropped: int = 0


def read_extremes(table: Table, styles: dict[str, int], budget: int) -> Extremes:
    """Read the videos at both ends of the first metric, at most `budget` characters; later seeds are left out first."""
    metric = next(iter(table.metrics), None)
    if metric is None:
        return Extremes()
    rows: list[ExtremeRow] = []
    dropped = 0
    for group, point in _by_seed([row.group for row in table.rows if row.group]):
        row = _row(group, point, metric, styles[group.id])
        if row is None:
            continue
        if dropped or sum(r.size for r in rows) + row.size > budget:
            dropped += 1
        else:
            rows.append(row)
    order = [row.id for row in table.rows]
    rows.sort(key=lambda row: (order.index(row.group.id), row.seed))
    return Extremes(metric=metric, rows=tuple(rows), dropped=dropped)


def _by_seed(groups: Sequence[Group]) -> Iterator[tuple[Group, PointResult]]:
    """Iterate over the first point of each group, then the second of each, and so on."""
    for points in zip_longest(*(group.finished for group in groups)):
        yield from ((group, point) for group, point in zip(groups, points, strict=True) if point is not None)


def _row(group: Group, point: PointResult, metric: Measure, style: int) -> ExtremeRow | None:
    ranked = sorted(_values(point, metric.name), key=lambda pair: (metric.better or 1) * pair[1])
    count = min(COUNT, len(ranked) // 2)
    if not count:
        return None

    def show(pairs: Sequence[tuple[VideoRow, float]]) -> tuple[RankedVideo, ...]:
        return tuple(
            RankedVideo(
                cell=video_cell([point.samples.folder / video.video], style),
                value=metric.text(value),
                caption=video.caption or video.prompt,
            )
            for video, value in pairs
        )

    return ExtremeRow(group=group, seed=point.seed, worst=show(ranked[:count]), best=show(ranked[-count:]))


def _values(point: PointResult, metric: str) -> Iterator[tuple[VideoRow, float]]:
    """Iterate over the point's videos that have a value."""
    scores = point.samples.measured.get(("", metric), {})
    for video in point.samples.own_videos:
        for score in scores.get(video.prompt, ()):
            if score.noise_seed == video.noise_seed and not math.isnan(score.mean):
                yield video, score.mean
