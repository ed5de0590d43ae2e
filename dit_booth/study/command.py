"""Run a whole study: every point of a sweep's description, each shared stage once.

    python experiments/sweep.py experiments/sweeps/schedule.yaml --dry-run
    python experiments/sweep.py experiments/sweeps/schedule.yaml
    python -m dit_booth.report runs/sweeps/schedule

The same command goes on where it was cut short, tries again what failed, and does nothing once all is there.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_booth.files import write_text
from dit_booth.study.board import write_hparams
from dit_booth.study.description import Description, read_description
from dit_booth.study.folder import check_name, running
from dit_booth.study.launch import run_points
from dit_booth.study.plan import Plan, plan_sweep
from dit_booth.study.rows import is_finished, row_of, write_rows
from dit_booth.study.show import show_plan, show_rows
from dit_booth.study.slots import hostfile_slots, local_slots


def main(argv: Sequence[str]) -> int:
    """0: all points are finished (or nothing was to be run); 1: some failed; 2: a wrong description; 130: cut short."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dit_booth.study").setLevel(logging.INFO)
    given = arguments(argv)
    try:
        plan, description = plan_of(given)
        if given.dry_run:
            print(show_plan(plan))
            return 0
        with running(plan):
            record(plan.folder / "sweep.yaml", description, given)
            if given.emit:
                from dit_booth.study.emit import emit

                print(emit(plan, given.emit), end="")
                return 0
            return run(plan, given)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def arguments(argv: Sequence[str]) -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", type=Path, help="the sweep's description (docs/sweeps.md)")
    parser.add_argument(
        "--override", type=Path, help="a file of the same form, whose values go over the sweep's"
    )
    parser.add_argument("--out", type=Path, help="the sweep's folder; default: runs/sweeps/<name>")
    parser.add_argument(
        "--store", type=Path, help="folder of shared stages; default: stages/ in the sweep's folder"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    parser.add_argument(
        "--emit", choices=("slurm", "shell"), help="write a job list to stdout instead of running"
    )
    parser.add_argument("--devices", help="GPUs to use, such as 0,1; default: all; none where there are none")
    parser.add_argument("--hostfile", type=Path, help="run on these machines (`name slots=8` lines)")
    parser.add_argument("--seconds", type=float, help="stop after so many seconds; the same command goes on")
    parser.add_argument(
        "--grace", type=float, default=60.0, help="seconds to write a checkpoint in when stopped"
    )
    parser.add_argument("--retries", type=int, default=1, help="how often a point that fails is tried again")
    return parser.parse_args(argv)


def plan_of(given: Any) -> tuple[Plan, Description]:
    """Read the description and plan it. ValueError: either cannot be, or the folder is another sweep's."""
    description = read_description(given.file, given.override)
    folder = given.out or Path("runs/sweeps") / description.name
    check_name(folder, description.name)
    return plan_sweep(description, folder, given.store or folder / "stages"), description


def record(file: Path, description: Description, given: Any) -> None:
    """The description as read, with the command that repeats it; one that can be read from where it lies."""
    import yaml

    if not given.override and given.file.resolve() == file.resolve():
        return  # it says already how it came about
    chosen = {"--override": given.override, "--out": given.out, "--store": given.store}
    flags = [word for flag, value in chosen.items() if value for word in (flag, str(value))]
    command = shlex.join(["python", "experiments/sweep.py", str(given.file), *flags])
    base = os.path.relpath(Path(description.base).resolve(), file.parent.resolve())
    settings = {"command": command, **description.as_dict(), "base": base}
    text = yaml.safe_dump({**settings, "seeds": list(description.seeds)}, sort_keys=False)
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)


def run(plan: Plan, given: Any) -> int:
    """Run what is missing, and say how it stands."""
    whole = True
    if all(is_finished(plan.run_folder(point)) for point in plan.points):
        print("all points are finished, nothing to do")
    else:
        devices, hosts = given.devices.split(",") if given.devices else None, given.hostfile
        remote = hosts and hostfile_slots(plan.ranks, hosts, plan.launcher)
        slots = remote or local_slots(plan.ranks, devices)
        whole = run_points(
            plan,
            slots,
            retries=given.retries,
            seconds=given.seconds,
            grace=given.grace,
            finished=lambda point: write_hparams(plan, point, row_of(plan, point, set())),
        )
    rows = write_rows(plan)
    for point, row in zip(plan.points, rows, strict=True):
        if row["status"] == "finished":  # also those that a process of another sweep has finished
            write_hparams(plan, point, row)
    print(show_rows(plan, rows))
    if not whole:
        return 130
    return 1 if any(row["status"] == "failed" for row in rows) else 0
