"""Long videos on the CPU: seconds per frame and peak memory by the number of frames, both backbones.

    python -m experiments.bench.long                                  # ten minutes
    python -m experiments.bench.long --table docs/results/long_cpu.md

The embedded pipelines write videos of 32 x 32 pixels to a file while they sample (`Pipeline.write`), in few steps:
chunks and a queue, with the plans of their training and with windows. Windows are causal, so chunks keep the keys and
values of their prefix; with 9 frames and a prefix of 2, 16 and 128 frames are whole chunks. Where memory does not grow
with the video, neither do the figures.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from dit_booth.config import LongConfig, PlainDict
from dit_booth.pipeline import Pipeline
from experiments.bench.measure import (
    conditions,
    interleaved,
    own_peak,
    peak_of_process,
    write_lines,
)

MODULE = "experiments.bench.long"
TEXT = "a star is spinning on snow"
PIPELINES = {"dit": "toyworld", "unet": "toyworld-unet"}


class Way(NamedTuple):
    """A way to make long videos: its options, the sampler's steps, and the plan of both kinds of attention."""

    long: LongConfig
    steps: int
    plan: str = ""
    """Empty: the plans of the training."""

    def settings(self, backbone: str) -> PlainDict:
        return {backbone: {"plan": self.plan, "temporal_plan": self.plan}} if self.plan else {}


QUEUE = LongConfig(kind="diffusion_forcing", prefix=0)
WAYS = {
    "chunks": Way(LongConfig(kind="chunks"), 2),
    "diffusion_forcing": Way(QUEUE, 4),
    "chunks, window(4)": Way(LongConfig(kind="chunks", window=9), 4, "window(4)"),
    "diffusion_forcing, window(4)": Way(QUEUE, 4, "window(4)"),
}
TIMED, HELD = (16, 128), (32, 256)
Row = dict[str, Any]


@dataclass(frozen=True)
class LongArguments:
    table: Path | None = None
    """Write this Markdown page, and the rows beside it under the same name."""
    backbones: tuple[str, ...] = tuple(PIPELINES)
    """Backbones to measure."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Ways to measure."""
    memory: bool = True
    """Also measure peak memory, in two processes for each row."""
    threads: int = 1
    """Threads of the CPU."""
    rounds: int = 1
    """Runs of every job, interleaved; the best one counts."""
    peak: str = ""
    """Run this one job and print the process's peak memory (what the bench starts for itself)."""


def name_of(backbone: str, way: str, frames: int) -> str:
    return f"{backbone}/{way}/{frames}"


def job(name: str) -> Callable[[], None]:
    """Load a pipeline; return what writes one video of the job's frames."""
    backbone, way, frames = name.split("/")
    one = WAYS[way]
    pipe = Pipeline.load(PIPELINES[backbone], settings=one.settings(backbone), device="cpu")

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            pipe.write(path, None, TEXT, frames=int(frames), steps=one.steps, long=one.long)

    return write


def measure(options: LongArguments) -> list[Row]:
    """Measure every way on every backbone, and print a JSON line each."""
    rows = []
    for backbone in options.backbones:
        for way in options.ways:
            short, long = (name_of(backbone, way, frames) for frames in TIMED)
            jobs = {n: job(n) for n in (short, long)}
            jobs[short]()  # warm up
            times = interleaved(jobs, options.rounds, torch.device("cpu"), 0, time.process_time)
            seconds = [times[n].best / frames for n, frames in zip((short, long), TIMED, strict=True)]
            held = HELD if options.memory else ()
            peaks = [peak_of_process(MODULE, name_of(backbone, way, n), options.threads) for n in held]
            row: Row = {
                "backbone": backbone,
                "way": way,
                "steps": WAYS[way].steps,
                "seconds_per_frame": [round(s, 4) for s in seconds],
                "peak_mib": [round(p, 1) for p in peaks],
                **conditions(torch.device("cpu")),
            }
            print(json.dumps(row))
            rows.append(row)
    return rows


def page(rows: list[Row]) -> str:
    """Return the table, for people."""
    first = rows[0]
    lines = [
        "# Long videos on the CPU",
        "",
        f"`python -m {MODULE} --table ...` on {first['device']}, {first['threads']} threads, PyTorch {first['torch']},"
        f" load {first['load']}. The embedded pipelines, 32 x 32 pixels, without an image. Seconds are those of the"
        " processor, the best of the rounds, encoding included; memory is the peak resident set of a process that"
        " writes one video.",
        "",
        f"| backbone | way | steps | s per frame, {TIMED[0]} | {TIMED[1]} | ratio | peak MiB, {HELD[0]} | {HELD[1]}"
        " | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        short, long = row["seconds_per_frame"]
        memory = "- | - | -"
        if row["peak_mib"]:
            small, large = row["peak_mib"]
            memory = f"{small:.0f} | {large:.0f} | {large / small:.2f}"
        lines.append(
            f"| {row['backbone']} | {row['way']} | {row['steps']} | {short:.3f} | {long:.3f} | {long / short:.2f}"
            f" | {memory} |"
        )
    return "\n".join(lines) + "\n"


def main(options: LongArguments) -> None:
    torch.set_num_threads(options.threads)
    if options.peak:
        job(options.peak)()
        print(own_peak())
        return
    rows = measure(options)
    if options.table:
        write_lines(options.table.with_suffix(".jsonl"), rows)
        options.table.write_text(page(rows))


if __name__ == "__main__":
    main(tyro.cli(LongArguments, description=__doc__))
