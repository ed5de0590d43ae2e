"""Forward passes of a few networks on the CPU, interleaved: times, and peak memory of a process that runs one alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.bench.measure import (
    Job,
    conditions,
    interleaved,
    matmul_peak,
    own_peak,
    peak_of_process,
    write_lines,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class SideBySideArguments:
    table: Path | None = None
    """Write this Markdown page, and the rows beside it under the same name."""
    threads: int = 2
    """Threads of the CPU."""
    rounds: int = 5
    """Runs of every job, interleaved."""
    peak: str = ""
    """Run this one job twice and print the process's peak memory (what the bench starts for itself)."""


def run(
    options: SideBySideArguments,
    module: str,
    jobs: Mapping[str, Callable[[], Job]],
    more: Callable[[Row], Row],
    page: Callable[[list[Row]], str],
) -> None:
    """Measure the jobs (name -> what makes it), print a JSON line each, with `more` of its fields, and write the page.

    ``over_first`` is the median over the rounds of a job's time over the first one's.
    """
    torch.set_num_threads(options.threads)
    if options.peak:
        job = jobs[options.peak]()
        for _ in range(2):
            job()
        print(own_peak())
        return
    cpu = torch.device("cpu")
    before = matmul_peak(torch.float32, cpu)
    times = interleaved({name: make() for name, make in jobs.items()}, options.rounds, cpu)
    after = matmul_peak(torch.float32, cpu)
    first = next(iter(times.values()))
    rows = []
    for name, t in times.items():
        row: Row = {
            "job": name,
            "seconds": round(t.median, 3),
            "best": round(t.best, 3),
            "over_first": round(t.over(first), 3),
            "peak_mib": round(peak_of_process(module, name, options.threads)),
            "matmul_gflops": [round(f / 1e9, 1) for f in (before, after)],
            **conditions(cpu),
        }
        rows.append(row | more(row))
        print(json.dumps(rows[-1]))
    if options.table:
        write_lines(options.table.with_suffix(".jsonl"), rows)
        options.table.write_text(page(rows))


def about(row: Row, module: str) -> str:
    """The command and the conditions, for a page."""
    before, after = row["matmul_gflops"]
    return (
        f"`python -m {module} --table ...` on {row['device']}, {row['threads']} threads, PyTorch {row['torch']}, load"
        f" {row['load']}; float32, no gradients. Square matrix products ran at {before} GFLOP/s before and {after}"
        " after. Times are medians over rounds that alternate between the jobs; memory is the peak resident set of a"
        " process that runs one job only."
    )
