"""The frame of a command: parse its arguments, do its work, print lines, turn errors into one line and a status."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import tyro

from dit_booth.errors import suggest

A = TypeVar("A")
RESUMES = "stopped; the same command resumes"


def run_program(
    kind: type[A],
    work: Callable[[A], Iterable[str]],
    argv: Sequence[str],
    *,
    prog: str | None,
    description: str | None,
    level: int = logging.NOTSET,
    stopped: str = "stopped",
) -> int:
    """Parse `kind` from a command line and print the lines of `work`. Exits with a message on a bad flag.

    level: of the project's own log; default: warnings, as of all others.
    stopped: what Ctrl-C says, unless the work says it itself.

    Returns:
        0: done; 1: an error, said in one line; 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dit_booth").setLevel(level)
    flags = (tyro.conf.FlagCreatePairsOff,)
    try:
        for line in work(tyro.cli(kind, args=list(argv), prog=prog, description=description, config=flags)):
            print(line)
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or stopped}", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_subcommand(
    kinds: Mapping[str, Callable[[Sequence[str], str], int]],
    argv: Sequence[str],
    *,
    prog: str,
    description: str | None,
) -> int:
    """Run the subcommand that the command line names, with its arguments and its name; without one, print the usage.

    Returns:
        The subcommand's status; 2: there is no such subcommand.
    """
    words = list(argv)
    kind = words[0] if words else "--help"
    if kind in ("-h", "--help"):
        print(f"usage: {prog} {{{','.join(kinds)}}} [OPTIONS]\n\n{description}")
        raise SystemExit(0)
    if kind not in kinds:
        print(f"error: {prog} {kind!r} is no subcommand{suggest(kind, kinds)}", file=sys.stderr)
        return 2
    return kinds[kind](words[1:], f"{prog} {kind}")
