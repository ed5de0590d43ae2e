"""The page: a whole study in one self-contained HTML file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dit_booth.report.caveats import caveats
from dit_booth.report.plots import loss_plots, quality_plots
from dit_booth.report.samples import Samples, read_samples
from dit_booth.report.settings import compare_settings
from dit_booth.report.study import Study
from dit_booth.report.svg import DASH, element, marker
from dit_booth.report.table import Measure, Table


@dataclass(frozen=True)
class Page:
    """The HTML, and its samples with the number of rows that did not fit."""

    html: str
    samples: Samples


def make_page(study: Study, table: Table, *, max_bytes: int) -> Page:
    """Render the page; sample rows are dropped, the last one first, until it has at most `max_bytes`."""
    styles = _styles(study)
    samples = read_samples([row.group for row in table.rows], styles, max_bytes)
    context = _context(study, table, styles)
    html = _render(context, samples)
    while len(html.encode()) > max_bytes and samples.rows:
        samples = replace(samples, rows=samples.rows[:-1], dropped=samples.dropped + 1)
        html = _render(context, samples)
    return Page(html, samples)


def _styles(study: Study) -> dict[str, int]:
    """Return a style index for every group; 0, the neutral one, for the baseline."""
    ordered = sorted(study.groups, key=lambda group: not group.baseline)
    first = 0 if any(group.baseline for group in study.groups) else 1
    return {group.id: number for number, group in enumerate(ordered, first)}


def _context(study: Study, table: Table, styles: dict[str, int]) -> dict[str, object]:
    """Return the template's variables, except the samples."""
    return {
        "study": study,
        "table": table,
        "styles": styles,
        "over": sorted({e.over for row in table.rows for e in row.quality.values()}, reverse=True),
        "caveats": caveats(study, table),
        "quality": quality_plots(table, styles),
        "losses": loss_plots(study, styles),
        "settings": compare_settings(study),
        "facts": _facts(study),
        "sharing": _sharing(study),
        "failed": [point for point in study.points if point.status == "failed"],
        "compared": any(metric.name in row.differences for row in table.others for metric in table.metrics),
        "commands": _commands(study),
    }


def _render(context: dict[str, object], samples: Samples) -> str:
    folder = files("dit_booth.report") / "page"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"swatch": _swatch, "duration": duration, "number": _number}
    environment.filters["breakable"] = _breakable
    environment.globals |= {"isnan": math.isnan, "nan": math.nan}
    return environment.from_string((folder / "page.html").read_text()).render(
        **context,
        samples=samples,
        css=Markup((folder / "page.css").read_text()),
        js=Markup((folder / "page.js").read_text()),
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
    prompts = sorted({score.n for point in points for score in point.scores.values()})
    finished = sum(point.finished for point in points)
    facts = [("variant", len(study.groups)), ("seed", len(seeds)), ("prompt", prompts[-1] if prompts else 0)]
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
