"""Cost of a fine-stage sweep beside its stages: points that share one coarse stage, through the real engine.

    python -m experiments.bench.sweep_cost                         # CPU, minutes; runs/bench/sweep_cost.jsonl
    python -m experiments.bench.sweep_cost --steps 450             # stages of about three minutes on two cores
    python -m experiments.bench.sweep_cost --steps 450 --naive     # the naive way is run, too, instead of computed
    python -m experiments.bench.sweep_cost --table docs/results/sweep_cost.md

Measured is `experiments/sweep.py` on a new folder, from its start to its end: planning, every launch, training,
sampling, measuring and the table. A stage's time is that of its training steps. The overhead is what the sweep takes
beyond one coarse stage and the points' fine stages; sampling and measuring are part of it, and a column of their own.
What is left is launching and everything else: start-up, engines, checkpoints, files, the sweep itself.

The naive way trains a coarse stage in each point. Computed: the same sweep with as many coarse stages as points, each
as long as the measured one. Measured (`--naive`): each point as a sweep of its own, one after the other.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
import yaml

from dit_booth.files import read_lines
from dit_booth.study.rows import ROWS
from experiments.bench.measure import conditions, write_lines

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class SweepCostArguments:
    points: int = 6
    """Fine-stage points, up to six."""
    steps: int = 40
    """Training steps of every stage: their length."""
    videos: int = 12
    """Videos that each point samples, as in the shipped sweeps."""
    batch: int = 8
    """Videos in a training step, as in the shipped sweeps for two cores."""
    launcher: str = "deepspeed"
    """deepspeed or python."""
    naive: bool = False
    """Also run every point with a coarse stage of its own."""
    folder: Path = Path("runs/bench/sweep_cost")
    """Folder that the sweeps run in; removed first."""
    out: Path = Path("runs/bench/sweep_cost.jsonl")
    """The result, one JSON line."""
    table: Path | None = None
    """Also write a Markdown page, and the line beside it."""


def description(options: SweepCostArguments, only: int | None = None) -> dict[str, Any]:
    """The sweep's description; `only` one of its points."""
    variants = [
        {"kv_concat.update": update, "stages.fine.lr": lr}
        for update, lr in itertools.product(("first_frame_value", "direct"), (5e-4, 2e-4, 1e-4))
    ][: options.points]
    return {
        "base": str(ROOT / "experiments/configs/demo.yaml"),
        "options": {
            "strategy": "token_replacement+kv_concat",
            "stages.coarse.steps": options.steps,
            "stages.fine.steps": options.steps,
            "train.batch_size": options.batch,
            "sample.videos": options.videos,
        },
        "list": variants if only is None else [variants[only]],
        "controls": [],
        "launcher": options.launcher,
    }


def sweep(folder: Path, settings: Mapping[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """Run a sweep in a new folder; its seconds and its rows. RuntimeError: some point failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file = folder / "description.yaml"
    file.write_text(yaml.safe_dump(dict(settings), sort_keys=False))
    command = [sys.executable, str(ROOT / "experiments/sweep.py"), str(file), "--out", str(folder / "sweep")]
    begin = time.perf_counter()
    ended = subprocess.run(command, check=False, stdout=sys.stderr)
    seconds = time.perf_counter() - begin
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {ended.returncode}")
    return seconds, read_lines(folder / "sweep" / ROWS)


def costs(rows: Sequence[Mapping[str, Any]], seconds: float, naive: float | None = None) -> dict[str, Any]:
    """The figures of a sweep of `rows` that took `seconds`; `naive`: measured seconds of the naive way."""
    coarse = {stage["address"]: stage["seconds"] for row in rows for stage in row["stages"][:-1]}
    fine = [row["stages"][-1]["seconds"] for row in rows]
    sampling, launching = ([row[name] for row in rows] for name in ("sample_seconds", "launch_seconds"))
    shared = sum(coarse.values())
    stages = shared + sum(fine)
    computed = seconds + shared * (len(rows) - 1)
    return {
        "points": len(rows),
        "coarse_seconds": shared,
        "fine_seconds": fine,
        "sample_seconds": sampling,
        "launch_seconds": launching,
        "stage_seconds": stages,
        "sweep_seconds": seconds,
        "overhead": seconds / stages - 1,
        "overhead_sampling": sum(sampling) / stages,
        "overhead_rest": (seconds - sum(sampling)) / stages - 1,
        "naive_stage_seconds": shared * len(rows) + sum(fine),
        "naive_seconds": computed if naive is None else naive,
        "naive_is": "computed" if naive is None else "measured",
        "saved": 1 - seconds / (computed if naive is None else naive),
    }


def run(options: SweepCostArguments) -> dict[str, Any]:
    """The bench's line."""
    seconds, rows = sweep(options.folder / "shared", description(options))
    naive = None
    if options.naive:
        alone = (
            sweep(options.folder / f"alone{point}", description(options, point))
            for point in range(options.points)
        )
        naive = sum(seconds for seconds, _ in alone)
    settings = {name: getattr(options, name) for name in ("steps", "videos", "batch", "launcher")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**settings, **costs(rows, seconds, naive), **conditions(device)}


def page(row: Mapping[str, Any], command: str) -> str:
    """The Markdown page."""

    def each(name: str) -> str:
        values = row[name]
        return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    lines = [
        ("coarse stage", f"{row['coarse_seconds']:.1f}"),
        ("fine stage, each of " + str(row["points"]), each("fine_seconds")),
        ("sampling and measuring, each", each("sample_seconds")),
        ("launching, each", each("launch_seconds")),
        ("one coarse and all fine stages", f"{row['stage_seconds']:.1f}"),
        ("whole sweep", f"{row['sweep_seconds']:.1f}"),
        ("overhead", f"{row['overhead']:+.1%}"),
        ("overhead of sampling and measuring", f"{row['overhead_sampling']:+.1%}"),
        ("remaining overhead", f"{row['overhead_rest']:+.1%}"),
        (f"without sharing ({row['naive_is']})", f"{row['naive_seconds']:.1f}"),
        ("saved by sharing", f"{row['saved']:.1%}"),
    ]
    body = "\n".join(f"| {name} | {value} |" for name, value in lines)
    about = (
        f"{row['points']} points, {row['steps']} steps per stage, batch {row['batch']}, {row['videos']} videos per"
        f" point, launcher {row['launcher']}; {row['device']}, torch {row['torch']}, {row['threads']} threads, load"
        f" {row['load']} at the end. Seconds; for points, the mean (minimum to maximum)."
    )
    return f"# What a fine-stage sweep costs\n\n`{command}`\n\n{about}\n\n| | seconds |\n|---|---|\n{body}\n"


def main(options: SweepCostArguments) -> None:
    if not 1 <= options.points <= 6:
        raise SystemExit(f"error: points is {options.points}; there are 1 to 6")
    row = run(options)
    command = " ".join(["python -m experiments.bench.sweep_cost", *sys.argv[1:]])
    sys.stdout.write(page(row, command))
    write_lines(options.out, [row])
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(page(row, command))
        write_lines(options.table.with_suffix(".jsonl"), [row])


if __name__ == "__main__":
    main(tyro.cli(SweepCostArguments, description=__doc__))
