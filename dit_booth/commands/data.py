"""Build data sets of your own videos, look at them, and encode them once for all trainings.

    dit-booth data build --videos DIR --captions FILE --out DATA --segment.by grabcut --segment.folder BOXES
    dit-booth data inspect DATA
    dit-booth data cache DATA-CACHE --config my_run.yaml

`dit-booth data build --help` and so on tell the options; docs/data.md, formats, filters and figures.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import tyro

from dit_booth.commands.program import RESUMES, run_program, run_subcommand
from dit_booth.config import RunConfig
from dit_booth.data.build.settings import BuildSettings
from dit_booth.data.readers.formats import FormatName
from dit_booth.files import write_text


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: done; 1: an error, said in one line; 2: no such subcommand; 130: interrupted, resumable."""
    return run_subcommand(KINDS, argv, prog=prog or "dit-booth data", description=__doc__)


def run_build(argv: Sequence[str], prog: str) -> int:
    """Build a data set of videos and captions."""
    return run_program(
        BuildSettings,
        build_set,
        argv,
        prog=prog,
        description="Build a data set in VideoBooth's format of videos and captions; docs/data.md tells how.",
        level=logging.INFO,
        stopped=RESUMES,
    )


def build_set(settings: BuildSettings) -> Iterator[str]:
    """Build, and iterate over the lines of the report. ValueError: it cannot be built."""
    from dit_booth.data.build.build import build

    report = build(settings)
    yield from report.lines()
    if not report.accepted:
        raise ValueError(
            "no triplet is left; --help tells the thresholds, and manifest.parquet what was measured"
        )
    yield f"{settings.out}: --data.kind triplets --data.triplets.root {settings.out}"


def run_cache(argv: Sequence[str], prog: str) -> int:
    """Encode the training data of a run once."""
    from dit_booth.config.parse import parse

    if not argv or argv[0].startswith("-"):
        print(
            f"usage: {prog} FOLDER [the options of dit-booth run]; docs/data.md tells more", file=sys.stderr
        )
        return 0 if {"-h", "--help"} & set(argv) else 1
    return run_program(
        Folder, partial(cache_set, argv[1:], parse), argv[:1], prog=prog, description=None, stopped=RESUMES
    )


@dataclass(frozen=True)
class Folder:
    folder: Annotated[str, tyro.conf.Positional]
    """Folder of encoded data to write."""


def cache_set(flags: Sequence[str], parse: Callable[..., RunConfig], into: Folder) -> Iterator[str]:
    """Encode the training data of a run; iterate over lines. ValueError: see `encode_data`."""
    from dit_booth.components import build
    from dit_booth.training.encoded import encode_data

    config = parse(flags, default_config="demo")
    plain = replace(config, data=replace(config.data, cache=""))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield from encode_data(build(plain).to(device), Path(into.folder))


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    folder: Annotated[str, tyro.conf.Positional]
    """A data set: one that dit-booth data build has made, or any that can be trained on."""
    format: FormatName = "videobooth"
    """Format of one that was not built here, as in docs/data.md."""
    out: str = ""
    """The page; empty: inspect.html in the folder."""
    limit: int = 1000
    """Clips on the page, at most."""
    workers: int = 0
    """Processes; 0: one for each core."""


def run_inspect(argv: Sequence[str], prog: str) -> int:
    """Write the page of a data set."""
    return run_program(
        InspectArguments, inspect_set, argv, prog=prog, description="Write a page that shows a data set."
    )


def inspect_set(arguments: InspectArguments) -> Iterator[str]:
    """Write the page; iterate over lines. ValueError: the folder is no data set of the format."""
    from dit_booth.data.build.inspect import make_page

    page = make_page(
        Path(arguments.folder),
        format=arguments.format,
        limit=arguments.limit,
        workers=arguments.workers,
    )
    file = Path(arguments.out or Path(arguments.folder, "inspect.html"))
    write_text(file, page)
    yield f"{file}: {file.stat().st_size / 2**20:.1f} MiB"


KINDS: dict[str, Callable[[Sequence[str], str], int]] = {
    "build": run_build,
    "inspect": run_inspect,
    "cache": run_cache,
}
