"""Run all points of a sweep's description, each shared stage once.

    dit-booth sweep schedule --dry-run
    dit-booth sweep schedule
    dit-booth report runs/sweeps/schedule

The same command resumes an interrupted sweep, retries failed points, and does nothing once all points are finished.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from dit_booth.files import write_text
from dit_booth.study.board import write_hparams
from dit_booth.study.description import Description, read_description
from dit_booth.study.folder import check_name, shared_folder
from dit_booth.study.launch import run_points
from dit_booth.study.plan import SweepPlan, plan_sweep
from dit_booth.study.rows import is_finished, row_of, write_rows
from dit_booth.study.show import show_plan, show_rows
from dit_booth.study.slots import hostfile_slots, local_slots


@dataclass(frozen=True, kw_only=True)
class SweepArguments:
    """Arguments of ``dit-booth sweep``."""

    file: Annotated[Path, tyro.conf.Positional]
    """The sweep's description (docs/sweeps.md): a YAML file, or the name of a packaged sweep."""
    override: Path | None = None
    """A file of the same form; its values replace the sweep's."""
    out: Path | None = None
    """The sweep's folder; default: runs/sweeps/<name>."""
    store: Path | None = None
    """Folder of shared stages; default: stages/ in the sweep's folder."""
    dry_run: bool = False
    """Show the plan and its estimated cost, and stop."""
    emit: Literal["slurm", "shell"] | None = None
    """Write a job list to stdout instead of running."""
    devices: str | None = None
    """GPUs to use, such as 0,1; default: all visible ones, or the CPU."""
    hostfile: Path | None = None
    """Run on the machines of this file (`name slots=8` lines)."""
    seconds: float | None = None
    """Stop after this many seconds; the same command resumes."""
    grace: float = 60.0
    """Seconds that stopped points have to write a checkpoint."""
    retries: int = 1
    """Times that a failed point is tried again."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """Parse a command line and run the sweep; see `sweep`. Exits with a message on a bad flag."""
    return sweep(parse(argv, prog))


def parse(argv: Sequence[str], prog: str | None = None) -> SweepArguments:
    """Parse a command line."""
    return tyro.cli(
        SweepArguments,
        args=list(argv),
        prog=prog,
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def sweep(arguments: SweepArguments) -> int:
    """Plan the sweep, then show, emit or run it.

    Returns:
        0: all points are finished, or nothing was to be run; 1: points failed; 2: wrong description; 130: interrupted.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dit_booth.study").setLevel(logging.INFO)
    try:
        plan, description = plan_of(arguments)
        if arguments.dry_run:
            print(show_plan(plan))
            return 0
        with shared_folder(plan):
            record(plan.folder / "sweep.yaml", description, arguments)
            if arguments.emit:
                from dit_booth.study.emit import emit

                print(emit(plan, arguments.emit), end="")
                return 0
            return run(plan, arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan_of(arguments: SweepArguments) -> tuple[SweepPlan, Description]:
    """Read the description and plan it.

    Raises:
        ValueError: the description is wrong, or the folder belongs to another sweep.
    """
    description = read_description(arguments.file, arguments.override)
    folder = arguments.out or Path("runs/sweeps") / description.name
    check_name(folder, description.name)
    return plan_sweep(description, folder, arguments.store or folder / "stages"), description


def record(file: Path, description: Description, arguments: SweepArguments) -> None:
    """Write ``sweep.yaml``: the description as read, with the command that repeats the sweep."""
    if not arguments.override and arguments.file.resolve() == file.resolve():
        return  # it holds the command already
    chosen = {"--override": arguments.override, "--out": arguments.out, "--store": arguments.store}
    flags = [word for flag, value in chosen.items() if value for word in (flag, str(value))]
    command = shlex.join(["dit-booth", "sweep", str(arguments.file), *flags])
    base = os.path.relpath(Path(description.base).resolve(), file.parent.resolve())
    settings = {"command": command, **description.as_dict(), "base": base}
    text = yaml.safe_dump({**settings, "seeds": list(description.seeds)}, sort_keys=False)
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)


def run(plan: SweepPlan, arguments: SweepArguments) -> int:
    """Run the missing points and print the table; returns the exit code."""
    complete = True
    if all(is_finished(plan.run_folder(point)) for point in plan.points):
        print("all points are finished, nothing to do")
    else:
        devices, hosts = arguments.devices.split(",") if arguments.devices else None, arguments.hostfile
        remote = hosts and hostfile_slots(plan.ranks, hosts, plan.launcher)
        slots = remote or local_slots(plan.ranks, devices)
        complete = run_points(
            plan,
            slots,
            retries=arguments.retries,
            seconds=arguments.seconds,
            grace=arguments.grace,
            on_finished=lambda point: write_hparams(plan, point, row_of(plan, point, set())),
        )
    rows = write_rows(plan)
    for point, row in zip(plan.points, rows, strict=True):
        if row["status"] == "finished":  # also those that a process of another sweep has finished
            write_hparams(plan, point, row)
    print(show_rows(plan, rows))
    if not complete:
        return 130
    return 1 if any(row["status"] == "failed" for row in rows) else 0
