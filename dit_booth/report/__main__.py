"""A finished sweep, or a few runs, as one HTML page: tables with intervals, plots, playing samples, settings.

    python -m dit_booth.report runs/sweeps/schedule
    python -m dit_booth.report runs/a runs/b runs/c --out comparison.html --csv --latex

The page loads nothing from the network; what it needs is inside.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from dit_booth.files import write_text
from dit_booth.report.caveats import caveats
from dit_booth.report.export import to_csv, to_latex
from dit_booth.report.page import make_page
from dit_booth.report.read import read_study
from dit_booth.report.table import make_table

log = logging.getLogger("dit_booth")


@dataclass(frozen=True, kw_only=True)
class Settings:
    folders: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A sweep's folder, or run folders: a row each, the first one the baseline."""
    out: str = ""
    """The page; empty: report.html in the sweep's folder, or here for run folders."""
    csv: bool = False
    """Write the table beside the page as .csv too, every number in full."""
    latex: bool = False
    """Write the table beside the page as .tex too (booktabs)."""
    baseline: str = ""
    """The row, by its label, that the others are compared with; empty: the one that the sweep names."""
    max_mb: float = 8.0
    """Size of the page in MB: sample rows that do not fit are left out."""


def main(argv: Sequence[str]) -> int:
    """0: written; 1: an error, said in one line; 2: a bad flag."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    settings = tyro.cli(
        Settings, args=list(argv), description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        for line in report(settings):
            log.info("%s", line)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 1
    return 0


def report(settings: Settings) -> list[str]:
    """Write the page and the files beside it; what was written, and what was left out."""
    if not settings.folders:
        raise ValueError("folders is empty; give a sweep's folder, or run folders")
    if settings.max_mb <= 0:
        raise ValueError(f"max_mb is {settings.max_mb}; give a positive number of megabytes")
    folders = [Path(folder) for folder in settings.folders]
    study = read_study(folders)
    out = Path(settings.out) if settings.out else (study.folder if study.sweep else Path()) / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"out is {settings.out!r}; give the page's name a suffix .html")
    table = make_table(study, settings.baseline)
    page = make_page(study, table, max_bytes=round(settings.max_mb * 1_000_000))
    wanted = {out: page.html}
    if settings.csv:
        wanted[out.with_suffix(".csv")] = to_csv(table)
    if settings.latex:
        wanted[out.with_suffix(".tex")] = to_latex(table, [study.title, *caveats(study, table)])
    said = []
    for file, text in wanted.items():
        write_text(file, text)
        said.append(f"{file}  {len(text.encode()) / 1e6:.2f} MB")
    if page.samples.dropped:
        said.append(f"{page.samples.dropped} sample rows did not fit (--max-mb {settings.max_mb:g})")
    if len(page.html.encode()) > settings.max_mb * 1e6:
        said.append(f"the page is larger than --max-mb {settings.max_mb:g} even without samples")
    return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
