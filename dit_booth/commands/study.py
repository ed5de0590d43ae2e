"""Ask people which videos are better: make a page of pairs, collect answers, and analyse them.

dit-booth study power --systems 3 --prompts 12
dit-booth study make runs/a runs/b runs/c --out studies/first
dit-booth study serve studies/first
dit-booth study analyse studies/first
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

import tyro

from dit_booth.commands.program import run_program
from dit_booth.errors import check_number
from dit_booth.files import write_text
from dit_booth.human.exclude import Rules
from dit_booth.human.power import Plan
from dit_booth.human.settings import Settings


@dataclass(frozen=True, kw_only=True)
class MakeArguments(Settings):
    """Make the page that raters see, and the key that tells what it shows."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders, or folders with videos.csv; NAME=FOLDER gives a name. The first one is the baseline."""
    out: str
    """Folder of the study."""
    prompts: int = 0
    """Prompts to draw from those of the runs; 0: all."""
    questions: tuple[str, ...] = ()
    """Questions to ask, such as identity motion; empty: all of the texts."""
    texts: str = ""
    """A YAML file with title, consent, instructions and questions; empty: the packaged one, copied to the study."""


@dataclass(frozen=True, kw_only=True)
class AnalyseArguments(Rules):
    """Turn answers into preferences, strengths, agreement, and metrics' accuracy: a page, CSV and LaTeX."""

    answers: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files that raters have saved, logs of `study serve`, or folders of them."""
    study: str = ""
    """Folder of the study; empty: the answers' own, or the one above."""
    out: str = ""
    """The page; empty: results.html in the study's folder. CSV and LaTeX lie beside it."""


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """Hand out the page and collect answers, until Ctrl-C; started again, it goes on."""

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of the study."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine only, 0.0.0.0 from the network."""
    port: int = 8765
    """Port; 0: any free one."""
    token: str = ""
    """Part of the address that raters must know; empty: kept from the last start, or drawn."""
    max_mb: float = 100.0
    """Largest file of answers."""


@dataclass(frozen=True, kw_only=True)
class PowerArguments(Plan):
    """Tell which preference a study detects, over numbers of raters and prompts, with a plot."""

    detect: float = 0.6
    """Share of preferences to find the number of raters for."""
    out: str = "power.html"
    """The page."""


Arguments = MakeArguments | PowerArguments | ServeArguments | AnalyseArguments
StudyArguments = (
    Annotated[MakeArguments, tyro.conf.subcommand("make")]
    | Annotated[PowerArguments, tyro.conf.subcommand("power")]
    | Annotated[ServeArguments, tyro.conf.subcommand("serve")]
    | Annotated[AnalyseArguments, tyro.conf.subcommand("analyse")]
)


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: done; 1: an error, said in one line; 130: interrupted."""
    kind = cast("type[Arguments]", StudyArguments)  # tyro takes a union as subcommands
    return run_program(kind, study, argv, prog=prog, description=__doc__, level=logging.INFO)


def study(arguments: Arguments) -> Iterator[str]:
    """Do what was asked for, and iterate over lines that say what was done."""
    match arguments:
        case MakeArguments():
            yield from make(arguments)
        case PowerArguments():
            yield from power(arguments)
        case ServeArguments():
            yield from serve(arguments)
        case AnalyseArguments():
            yield from analyse(arguments)


def make(arguments: MakeArguments) -> Iterator[str]:
    """Write the study's folder. ValueError: see `make_study`, `read_systems` and `read_texts`."""
    from dit_booth.human.key import KEY, PAGE, TEXTS
    from dit_booth.human.page import make_study
    from dit_booth.human.systems import read_systems
    from dit_booth.human.texts import default_texts, read_texts

    text = Path(arguments.texts).read_text() if arguments.texts else default_texts()
    texts = read_texts(text, arguments.texts or TEXTS, arguments.questions)
    systems = read_systems(arguments.runs, arguments.prompts, arguments.seed)
    out = Path(arguments.out)
    key = make_study(systems, texts, text, arguments, out)
    yield f"{out / PAGE}  {(out / PAGE).stat().st_size / 1e6:.2f} MB: give it to raters"
    yield f"{out / KEY}  {len(key.systems)} systems, {len(key.prompts)} prompts, {len(key.lists)} lists: keep it"
    yield f"{out / TEXTS}  edit it and give it with --texts"


def power(arguments: PowerArguments) -> Iterator[str]:
    """Write the page of the power analysis. ValueError: a number is out of its range."""
    from dit_booth.human.power import detectable, raters_needed
    from dit_booth.human.power_page import make_power_page, power_table

    check_number("detect", arguments.detect, "(0.5, 1]", whole=False)
    out = Path(arguments.out)
    if out.suffix != ".html":
        raise ValueError(f"out is {arguments.out!r}; give the page's name a suffix .html")
    prompts, rows = power_table(arguments)
    yield "raters" + "".join(f"{f'{count} prompts':>14}" for count in prompts)
    for raters, shares in rows:
        yield f"{raters:6}" + "".join(f"{share:14.3f}" if share <= 1 else f"{'none':>14}" for share in shares)
    found = detectable(arguments)
    share = f"{found.share:.3f}" if found.share <= 1 else "none"
    yield f"{arguments.raters} raters, {arguments.prompts} prompts: {share}, standard error {found.stderr:.3f}"
    needed = raters_needed(arguments, arguments.detect)
    yield f"{arguments.detect:g} needs {needed or 'more prompts: no number of'} raters"
    write_text(out, make_power_page(arguments))
    yield str(out)


def serve(arguments: ServeArguments) -> Iterator[str]:
    """Serve until interrupted; the address is the first line. ValueError: a bad number or token, or no study."""
    from dit_booth.human.key import ANSWERS
    from dit_booth.human.serve import StudyServer

    check_number("port", arguments.port, "[0, 65535]")
    check_number("max_mb", arguments.max_mb, "(0, 100000]", whole=False)
    folder = Path(arguments.folder)
    token = keep_token(folder, arguments.token)
    with StudyServer(
        folder, host=arguments.host, port=arguments.port, token=token, max_mb=arguments.max_mb
    ) as server:
        yield f"{server.address}  give this address to raters; answers go to {folder / ANSWERS}; Ctrl-C stops"
        sys.stdout.flush()
        server.serve_forever()


def keep_token(folder: Path, given: str) -> str:
    """Return the token of the address: the given one, else that of the last start, else a new one. Stores it."""
    file = folder / "token"
    token = given or (file.read_text().strip() if file.is_file() else "") or secrets.token_urlsafe(16)
    if not (8 <= len(token) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_") for c in token)):
        raise ValueError(f"token is {token!r}; use 8 to 64 letters, digits, - and _")
    if not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, which does not exist; make the study first")
    write_text(file, token + "\n")
    file.chmod(0o600)
    return token


def analyse(arguments: AnalyseArguments) -> Iterator[str]:
    """Write the results. ValueError: no study, no answers, or nobody is left after the checks."""
    from dit_booth.human.analyse import analyse as compute
    from dit_booth.human.answers import find_files, read_answers
    from dit_booth.human.export import percent, to_csv, to_latex
    from dit_booth.human.key import KEY, read_key
    from dit_booth.human.predict import read_metrics
    from dit_booth.human.result_page import make_result_page

    paths = [Path(path) for path in arguments.answers]
    folder = Path(arguments.study) if arguments.study else find_study(paths)
    key = read_key(folder / KEY)
    out = Path(arguments.out) if arguments.out else folder / "results.html"
    if out.suffix != ".html":
        raise ValueError(f"out is {arguments.out!r}; give the page's name a suffix .html")
    results = compute(key, read_answers(key, find_files(paths)), arguments, read_metrics(key, folder))
    names = [system.name for system in key.systems]
    yield f"{len(results.kept)} raters, {len(results.excluded)} excluded, {len(results.observations)} answers"
    yield from (f"excluded: {one.rater.id[:8]}: {one.excluded}" for one in results.excluded)
    yield from (f"refused: {where}: {reason}" for where, reason in results.collected.refused.items())
    for p in results.preferences:
        yield f"{p.question:10} {names[p.first]} over {names[p.second]}: {percent(p.rate)} %"
    wanted = {".html": make_result_page(results), ".csv": to_csv(results), ".tex": to_latex(results)}
    for suffix, text in wanted.items():
        write_text(out.with_suffix(suffix), text)
        yield str(out.with_suffix(suffix))


def find_study(paths: Sequence[Path]) -> Path:
    """Return the folder with the key, at or above the answers. ValueError: there is none."""
    from dit_booth.human.key import KEY

    near = [folder for path in paths for folder in (path, path.parent, path.resolve().parent.parent)]
    found = next((folder for folder in near if (folder / KEY).is_file()), None)
    if found is None:
        raise ValueError(f"study: no {KEY} beside {paths[0]}; give the study's folder with --study")
    return found
