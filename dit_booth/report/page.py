"""The page: a whole study in one self-contained HTML file."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from dit_booth.report.caveats import caveats
from dit_booth.report.curves import drift_plots, drift_table, scatter_plots
from dit_booth.report.export import p_text
from dit_booth.report.extremes import Extremes, read_extremes
from dit_booth.report.measures import Measure
from dit_booth.report.plots import loss_plots, quality_plots
from dit_booth.report.samples import Samples, read_samples
from dit_booth.report.settings import compare_settings
from dit_booth.report.study import Study
from dit_booth.report.svg import DASH, element, marker
from dit_booth.report.table import Table
from dit_booth.report.template import ASSETS, render, style
from dit_booth.report.values import metrics_of, values_of
from dit_booth.study.statistics import MIN_SEEDS, estimate_mean


@dataclass(frozen=True)
class Page:
    """The HTML, and its videos with the number of those that did not fit."""

    html: str
    samples: Samples
    extremes: Extremes


def make_page(study: Study, table: Table, *, max_bytes: int) -> Page:
    """Render the page with at most `max_bytes`: points at the ends and sample rows are dropped, the last ones first."""
    styles = _styles(study)
    groups = [row.group for row in table.rows if row.group]
    extremes = read_extremes(table, styles, max_bytes // 3)
    room = max_bytes - sum(row.size for row in extremes.rows)
    samples = read_samples(groups, styles, room)
    context = _context(study, table, styles)
    html = _render(context, samples, extremes)
    while len(html.encode()) > max_bytes and (samples.rows or extremes.rows):
        if extremes.rows:
            extremes = replace(extremes, rows=extremes.rows[:-1], dropped=extremes.dropped + 1)
        else:
            samples = replace(samples, rows=samples.rows[:-1], dropped=samples.dropped + 1)
        html = _render(context, samples, extremes)
    return Page(html, samples, extremes)


def _styles(study: Study) -> dict[str, int]:
    """Return a style index for every group; 0, the neutral one, for the baseline."""
    ordered = sorted(study.groups, key=lambda group: not group.baseline)
    first = 0 if any(group.baseline for group in study.groups) else 1
    return {group.id: number for number, group in enumerate(ordered, first)}


def _context(study: Study, table: Table, styles: dict[str, int]) -> dict[str, object]:
    """Return the template's variables, except the videos."""
    return {
        "study": study,
        "table": table,
        "styles": styles,
        "over": _over(table),
        "mixed": len({e.main.over for row in table.rows for e in row.quality.values()}) > 1,
        "min_seeds": MIN_SEEDS,
        "caveats": caveats(study, table),
        "quality": quality_plots(table, styles),
        "losses": loss_plots(study, styles),
        "drift": drift_table(table),
        "drifts": drift_plots(table, styles),
        "scatters": scatter_plots(study, table),
        "settings": compare_settings(study),
        "facts": _facts(study),
        "sharing": _sharing(study),
        "failed": [point for point in study.points if point.status == "failed"],
        "labels": {metric.name: metric.label for metric in table.metrics},
        "compared": any(metric.name in row.differences for row in table.others for metric in table.metrics),
        "commands": _commands(study),
        "left_out": [
            (point, video, reason)
            for point in study.points
            for video, reason in point.samples.left_out.items()
        ],
        "point_means": _point_means(study),
    }


def _over(table: Table) -> str:
    """Return what most intervals of the table are over; those of others are marked."""
    kinds = Counter(e.main.over for row in table.rows for e in row.quality.values())
    return kinds.most_common(1)[0][0] if kinds else ""


def _point_means(study: Study) -> dict[str, dict[str, float]]:
    """Return point -> metric -> mean over its prompts."""
    return {
        point.id: {
            name: estimate.mean
            for name in metrics_of([point])
            if (estimate := estimate_mean(values_of([point], name)))
        }
        for point in study.points
    }


def _render(context: dict[str, object], samples: Samples, extremes: Extremes) -> str:
    return render(
        (ASSETS / "page.html").read_text(),
        {"breakable": _breakable},
        **context,
        swatch=_swatch,
        duration=duration,
        number=_number,
        isnan=math.isnan,
        nan=math.nan,
        p_text=p_text,
        samples=samples,
        extremes=extremes,
        css=style(),
        js=Markup((ASSETS / "page.js").read_text()),
    )


def _swatch(style: int) -> Markup:
    """Return a row's marker, as in the plots."""
    return element(
        "svg", marker(style, 7.0, 7.0, 4.6), viewBox="0 0 14 14", class_="swatch", aria_hidden="true"
    )


def _breakable(label: str) -> Markup:
    """Allow line breaks after the underscores of a name."""
    return escape(label).replace("_", Markup("_<wbr>"))


def _facts(study: Study) -> list[tuple[str, str]]:
    """Return (value, label) of the figures under the title."""
    points = study.points
    seeds = sorted({point.seed for point in points})
    prompts = max((len(point.samples.prompts) for point in points), default=0)
    noise = {video.noise_seed for point in points for video in point.samples.videos if not video.control}
    finished = sum(point.finished for point in points)
    facts = [("variant", len(study.groups)), ("training seed", len(seeds)), ("prompt", prompts)]
    facts += [("noise seed", len(noise))] if len(noise) > 1 else []
    return [
        *((str(count), name if count == 1 else f"{name}s") for name, count in facts),
        (f"{finished} of {len(points)}", "points finished"),
    ]


def _commands(study: Study) -> list[str]:
    """Return commands that repeat the study; for a sweep, one of its points, too."""
    example = next((point for point in study.points if point.finished), None)
    if example is None or len(study.commands) >= len(study.points):
        return list(study.commands)
    alone = f"dit-booth run --config {example.folder / 'run.yaml'} --out FOLDER"
    return [*study.commands, "", "# one point alone", alone]


def _sharing(study: Study) -> str:
    """Return sentences about the training that sharing saved, and the cost of launching."""
    used = [(stage, point) for point in study.points for stage in point.stages if stage.address]
    known = [stage for stage, _ in used if not math.isnan(stage.seconds)]
    once = {(stage.name, stage.address): stage.seconds for stage in known}
    said = []
    if len(once) < len(known):
        apart = sum(once[stage.name, stage.address] for stage in known)
        said.append(
            f"{len(once)} stages were trained, in {duration(sum(once.values()))};"
            f" without sharing, the points would have trained {len(known)}, in {duration(apart)}."
        )
    launches = [point.launch_seconds for point in study.points if not math.isnan(point.launch_seconds)]
    if launches:
        said.append(f"Launching took {sum(launches) / len(launches):.1f} s per point, on average.")
    return " ".join(said)


def duration(seconds: float) -> str:
    """Format seconds: ``8.1 s``, ``4 min 6 s``, ``2 h 5 min``."""
    if math.isnan(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(measure: Measure, value: float) -> str:
    """Return a cell's sort key; empty if unknown."""
    return "" if math.isnan(value) else repr(value)
