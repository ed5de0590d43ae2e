"""Limits of the conclusions from a table, as sentences derived from the data."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dit_booth.report.study import Study
from dit_booth.report.table import Table
from dit_booth.study.statistics import t_quantile

_FEW_SEEDS = 3
_FEW_PROMPTS = 30


def caveats(study: Study, table: Table) -> list[str]:
    """Return sentences, the most serious first; empty if nothing limits the conclusions."""
    said = [*_absent(study, table)]
    if table.rows:
        said += [*_seeds(table), *_prompts(table), *_comparisons(table), *_setting(study)]
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
    lone = [r.group.label for r in table.rows if 0 < len(r.group.finished) < len(r.group.points)]
    if lone:
        yield f"Some seeds of {', '.join(lone)} are missing; paired differences use the seeds in common."
    flagged = next((group for group in study.groups if group.baseline), None)
    if table.rows and table.baseline is None and len(table.rows) > 1:
        yield (
            f"The baseline, {flagged.label}, has no finished point: there are no paired differences."
            if flagged
            else "No variant is the baseline, so there are no paired differences (--baseline LABEL names one)."
        )


def _seeds(table: Table) -> Iterator[str]:
    counts = sorted({len(row.group.finished) for row in table.rows})
    if counts[-1] == 1:
        yield (
            "One training seed per variant. Intervals are over prompts: they show the variation over prompts for these"
            " trained models, and nothing about other training seeds."
        )
    elif counts[0] < _FEW_SEEDS:
        few = counts[0] if counts[0] > 1 else counts[1]
        alone = " Variants with one seed have intervals over prompts instead." if counts[0] == 1 else ""
        yield (
            f"Few seeds: {_range(counts)} per variant. A 95 % interval over {few} seeds reaches {t_quantile(few):.1f}"
            f" standard errors to each side (1.96 with many): it is wide; most differences are not significant.{alone}"
        )


def _prompts(table: Table) -> Iterator[str]:
    counts = sorted(
        {score.n for row in table.rows for p in row.group.finished for score in p.scores.values()}
    )
    if counts and counts[0] < _FEW_PROMPTS:
        yield f"Few prompts: {_range(counts)} per point. Other prompts may rank the variants differently."
    keys = {
        point.seed: {prompt.key for prompt in point.prompts}
        for row in table.rows
        for point in row.group.finished
        if point.prompts
    }
    for row in table.rows:
        for point in row.group.finished:
            if point.prompts and {prompt.key for prompt in point.prompts} != keys[point.seed]:
                yield "Points have different prompts; paired differences use the prompts in common."
                return


def _comparisons(table: Table) -> Iterator[str]:
    count = sum(metric.name in row.differences for row in table.others for metric in table.metrics)
    if count >= 10:
        yield (
            f"{count} differences are tested at 95 %, without correction: about {math.ceil(count / 20)} would be marked"
            " by chance if there were no true differences."
        )


def _setting(study: Study) -> Iterator[str]:
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
    if everywhere("clip.pretrained", "embedded"):
        yield "CLIP scores come from the embedded toy-world CLIP; do not compare them with published scores."
    given = sorted({str(setting.get("sample.reference", "own")) for setting in settings} - {"own"})
    if given:
        yield f"Some videos were sampled with sample.reference {' and '.join(given)}, not from their own image prompt."


def _range(counts: list[int]) -> str:
    return str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
