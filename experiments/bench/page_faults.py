"""What page faults cost a training step on the CPU: a step with glibc's heap as it is, and with freed memory kept.

    python -m experiments.bench.page_faults --table docs/results/page_faults.md

Each measurement is a process of its own, because the heap's settings hold for good; the two take turns, because the
machine's speed drifts.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from dit_booth.training.heap import keep_freed_memory
from experiments.bench.measure import conditions, write_lines
from experiments.bench.train_step import Bench, Case
from experiments.bench.train_step import Options as StepOptions

MODULE = "experiments.bench.page_faults"
HEADS = (
    *("size", "latents", "videos", "strategy", "default, s/step", "kept, s/step", "kept/default"),
    *("default, faults/step", "kept, faults/step"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    size: str = "nano"
    """Size of the DiT."""
    latents: int = 16
    """Side of a frame's latents."""
    batch: int = 8
    """Videos in a step."""
    strategies: tuple[str, ...] = ("none", "kv_concat", "in_context")
    """Strategies."""
    steps: int = 10
    """Timed steps of a process."""
    rounds: int = 3
    """Processes of each kind."""
    threads: int = 2
    """Threads."""
    out: Path = Path("runs/bench/page_faults.jsonl")
    """One JSON object for each strategy."""
    table: Path | None = None
    """Also write this Markdown page."""
    alone: Literal["default", "kept"] | None = None
    """Measure here, the first strategy, and print JSON: what the other processes do."""


def alone(options: Options) -> dict[str, float]:
    """Median seconds and page faults of a step in this process."""
    torch.set_num_threads(options.threads)
    if options.alone == "kept":
        keep_freed_memory()
    side, device = options.latents, torch.device("cpu")
    case = Case(options.size, 16, "first+previous", options.strategies[0], (4, side, side))
    bench = Bench.of(case, StepOptions(device="cpu", batch=options.batch), device, torch.float32)
    for _ in range(2):
        bench.step()
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, []
    for _ in range(options.steps):
        start = time.perf_counter()
        bench.step()
        seconds.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"seconds": statistics.median(seconds), "faults": faults / options.steps}


def measure(options: Options, strategy: str) -> dict[str, Any]:
    """A strategy's row."""
    told: dict[str, list[dict[str, float]]] = {"default": [], "kept": []}
    given = {name: getattr(options, name) for name in ("size", "latents", "batch", "steps", "threads")}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    for _ in range(options.rounds):
        for kind, rows in told.items():
            command = [sys.executable, "-m", MODULE, *flags, "--strategies", strategy, "--alone", kind]
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(ended.stdout.splitlines()[-1]))
    row: dict[str, Any] = {**given, "strategy": strategy, **conditions(torch.device("cpu"))}
    for kind, rows in told.items():
        row |= {f"{name}_{kind}": statistics.median(r[name] for r in rows) for name in ("seconds", "faults")}
    pairs = zip(told["kept"], told["default"], strict=True)
    return {**row, "over_default": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    case = (row["size"], f"{row['latents']} x {row['latents']}", str(row["batch"]), row["strategy"])
    seconds = (f"{row[name]:.3f}" for name in ("seconds_default", "seconds_kept", "over_default"))
    return (*case, *seconds, *(f"{row[name]:.0f}" for name in ("faults_default", "faults_kept")))


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The Markdown page."""
    row = rows[0]
    about = (
        f"{row['device']}, torch {row['torch']}, float32, {row['threads']} threads, 16 frames; `default`: glibc's heap"
        " as it is, `kept`: as a run sets it (`dit_booth/training/heap.py`). Each process alone, in turn; medians."
    )
    lines = [" | ".join(("", *_cells(r), "")).strip() for r in rows]
    table = "\n".join([f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", *lines])
    return f"# Page faults of a training step\n\n`{command}`\n\n{about}\n\n{table}\n"


def main(options: Options) -> None:
    if options.alone:
        print(json.dumps(alone(options)))
        return
    rows = [measure(options, strategy) for strategy in options.strategies]
    text = page(rows, " ".join([f"python -m {MODULE}", *sys.argv[1:]]))
    sys.stdout.write(text)
    write_lines(options.out, rows)
    if options.table:
        options.table.write_text(text)
        write_lines(options.table.with_suffix(".jsonl"), rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
