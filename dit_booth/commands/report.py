"""Write a finished sweep, or a few runs, as one HTML page: tables with intervals, plots, playing samples, settings.

    dit-booth report runs/sweeps/schedule
    dit-booth report runs/a runs/b runs/c --out comparison.html --csv --latex

The page is self-contained: it loads nothing from the network.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dit_booth.evaluation.scores import write_scores
from dit_booth.files import write_text
from dit_booth.report.caveats import caveats
from dit_booth.report.export import contrasts_to_csv, to_csv, to_latex
from dit_booth.report.page import make_page
from dit_booth.report.read import read_study
from dit_booth.report.table import make_table
from dit_booth.report.values import scores_of

log = logging.getLogger("dit_booth")


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Arguments of ``dit-booth report``."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A sweep's folder, or run folders: one row each, the first one the baseline."""
    out: str = ""
    """The page; empty: report.html in the sweep's folder, or here for run folders."""
    csv: bool = False
    """Also write the table as .csv beside the page, in full precision, and the primary contrasts as .contrasts.csv."""
    latex: bool = False
    """Also write the table as .tex beside the page (booktabs)."""
    scores: bool = False
    """Also write the scores of all points, video by video and frame by frame, as .scores.jsonl.gz beside the page."""
    baseline: str = ""
    """Label of the row that the others are compared with; empty: the sweep's own baseline."""
    max_mb: float = 8.0
    """Largest size of the page in MB: videos that do not fit are left out."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """Parse a command line and write the report; see `report`. Exits with a message on a bad flag."""
    return report(parse(argv, prog))


def parse(argv: Sequence[str], prog: str | None = None) -> ReportArguments:
    """Parse a command line."""
    return tyro.cli(
        ReportArguments,
        args=list(argv),
        prog=prog,
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def report(arguments: ReportArguments) -> int:
    """Write the report and log its files. Returns 0, or 1 after an error, which is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    try:
        for line in write_report(arguments):
            log.info("%s", line)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def write_report(arguments: ReportArguments) -> list[str]:
    """Write the page and the files beside it. Returns a line for each file, and for what was left out."""
    if not arguments.folders:
        raise ValueError("folders is empty; give a sweep's folder, or run folders")
    if arguments.max_mb <= 0:
        raise ValueError(f"max_mb is {arguments.max_mb}; give a positive number of megabytes")
    folders = [Path(folder) for folder in arguments.folders]
    study = read_study(folders)
    out = Path(arguments.out) if arguments.out else (study.folder if study.sweep else Path()) / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"out is {arguments.out!r}; give the page's name a suffix .html")
    table = make_table(study, arguments.baseline)
    page = make_page(study, table, max_bytes=round(arguments.max_mb * 1_000_000))
    wanted = {out: page.html}
    if arguments.csv:
        wanted[out.with_suffix(".csv")] = to_csv(table)
        if table.contrasts is not None:
            wanted[out.with_suffix(".contrasts.csv")] = contrasts_to_csv(table.contrasts)
    if arguments.latex:
        wanted[out.with_suffix(".tex")] = to_latex(table, [study.title, *caveats(study, table)])
    lines = []
    for file, text in wanted.items():
        write_text(file, text)
        lines.append(f"{file}  {len(text.encode()) / 1e6:.2f} MB")
    if arguments.scores:
        file = out.with_suffix(".scores.jsonl.gz")
        write_scores(file, scores_of(study))
        lines.append(f"{file}  {file.stat().st_size / 1e6:.2f} MB")
    if page.extremes.dropped:
        lines.append(
            f"the ends of {page.extremes.dropped} points did not fit (--max-mb {arguments.max_mb:g})"
        )
    if page.samples.dropped:
        lines.append(f"{page.samples.dropped} sample rows did not fit (--max-mb {arguments.max_mb:g})")
    if len(page.html.encode()) > arguments.max_mb * 1e6:
        lines.append(f"the page is larger than --max-mb {arguments.max_mb:g} even without videos")
    return lines
