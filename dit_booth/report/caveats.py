"""Limits of the conclusions from a table, as sentences derived from the data."""

from __future__ import annotations

from collections.abc import Iterator

from dit_booth.evaluation.catalogue import describe
from dit_booth.report.measures import MOTION
from dit_booth.report.study import Study
from dit_booth.report.table import Table
from dit_booth.study.statistics import MIN_SEEDS, t_quantile

_FEW_PROMPTS = 30


def caveats(study: Study, table: Table) -> list[str]:
    """Return sentences, the most serious first; empty if nothing limits the conclusions."""
    said = [*_absent(study, table)]
    if table.rows:
        said += [*_left_out(table), *_seeds(table), *_prompts(table), *_tests(table), *_still(table)]
        said += _setting(study, table)
    return said


def _absent(study: Study, table: Table) -> Iterator[str]:
    total, finished = len(study.points), sum(point.finished for point in study.points)
    if not finished:
        yield f"No point has finished ({total} planned): there is nothing to compare yet."
    elif finished < total:
        failed = sum(point.status == "failed" for point in study.points)
        kinds = [f"{failed} failed"] if failed else []
        kinds += [f"{total - finished - failed} are not finished"] if total - finished - failed else []
        yield f"{finished} of {total} points are in the table: {' and '.join(kinds)}."
    lone = [r.label for r in table.rows if r.group and len(r.points) < len(r.group.points)]
    if lone:
        yield f"Some seeds of {', '.join(lone)} are missing; paired differences use the seeds in common."
    flagged = next((group for group in study.groups if group.baseline), None)
    if table.rows and table.baseline is None and len(table.rows) > 1:
        yield (
            f"The baseline, {flagged.label}, has no finished point: there are no paired differences."
            if flagged
            else "No variant is the baseline, so there are no paired differences (--baseline LABEL names one)."
        )


def _left_out(table: Table) -> Iterator[str]:
    for row in table.rows:
        reasons = [reason for point in row.points for reason in point.samples.left_out.values()]
        if reasons:
            what = "1 video, which" if len(reasons) == 1 else f"{len(reasons)} videos, which"
            yield f"{row.label} lacks {what} could not be scored; the first: {reasons[0]}."


def _seeds(table: Table) -> Iterator[str]:
    counts = sorted({len(row.points) for row in table.rows})
    if counts[0] >= MIN_SEEDS:
        return
    told = f"{_range(counts)} training seed{'s' if counts[-1] > 1 else ''} per variant"
    rule = f"no difference is marked below {MIN_SEEDS}"
    if counts[-1] == 1:
        yield (
            f"Exploratory: {told}; {rule}. Intervals are over prompts: they show the variation over prompts for these"
            " trained models, and nothing about other trainings."
        )
        return
    few = counts[0] if counts[0] > 1 else counts[1]
    alone = " Variants with one seed have intervals over prompts alone." if counts[0] == 1 else ""
    yield (
        f"Exploratory: {told}; {rule}. With {few} seeds a 95 % interval may reach {t_quantile(few - 1):.1f} standard"
        f" errors to each side (1.96 with many).{alone}"
    )


def _prompts(table: Table) -> Iterator[str]:
    points = [point for row in table.rows for point in row.points]
    counts = sorted({len(point.samples.prompts) for point in points if point.samples.measured})
    if not counts:
        yield "No video was scored: no point has a file samples/scores.jsonl."
        return
    unscored = sum(not point.samples.measured for point in points)
    if unscored:
        yield f"{unscored} of {len(points)} finished points have no scores (samples/scores.jsonl)."
    if counts[0] < _FEW_PROMPTS:
        yield f"Few prompts: {_range(counts)} per point. Other prompts may rank the variants differently."
    if len({frozenset(point.samples.prompts) for point in points if point.samples.measured}) > 1:
        yield "Points have different prompts; paired differences use the prompts in common."


def _tests(table: Table) -> Iterator[str]:
    """Say which differences are tested, and which only describe."""
    count = sum(metric.name in row.differences for row in table.others for metric in table.metrics)
    if not count:
        return
    if table.contrasts is None:
        yield f"No primary contrast was declared: all {count} differences are descriptive, and none is marked."
        return
    tested = len(table.contrasts.results)
    contrasts = f"{tested} contrast{'' if tested == 1 else 's'} of {table.contrasts.metric.label}"
    chance = "descriptive: among many, some intervals exclude 0 by chance."
    if table.contrasts.exploratory:
        yield f"Declared, but not tested with so few training seeds: {contrasts}. All differences are {chance}"
    else:
        yield f"Declared and tested together (Holm): {contrasts}. All other differences are {chance}"


def _still(table: Table) -> Iterator[str]:
    if any(metric.consistency for metric in table.metrics):
        beside = f"read it beside {describe(MOTION).label.lower()}"
        if not any(metric.name == MOTION for metric in table.metrics):
            beside = "motion was not measured here"
        yield f"A still video wins every consistency: {beside}."


def _setting(study: Study, table: Table) -> Iterator[str]:
    settings = [point.settings for point in study.points if point.settings]

    def everywhere(name: str, value: str) -> bool:
        return bool(settings) and all(setting.get(name) == value for setting in settings)

    if everywhere("data.kind", "toyworld"):
        size, frames = (
            {str(setting.get(f"data.{name}")) for setting in settings} for name in ("size", "frames")
        )
        yield (
            f"All data are the toy world's (drawn shapes, {'/'.join(sorted(size))} pixels, {'/'.join(sorted(frames))}"
            " frames): the ranking may differ on natural videos and at full size."
        )
    if everywhere("clip.pretrained", "embedded") and any(m.name.startswith("own_") for m in table.metrics):
        yield "The own CLIP is the embedded one of the toy world; do not compare its scores with published ones."


def _range(counts: list[int]) -> str:
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
