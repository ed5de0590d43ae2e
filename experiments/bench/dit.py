"""The video DiT's forward pass on the CPU, in Latte's layout and our own, against Latte's measured figure.

    python -m experiments.bench.dit                                   # two threads, a minute
    python -m experiments.bench.dit --table docs/results/dit_cpu.md

S/2 (hidden 384, depth 12, heads 6, patch 2), one video of 16 x 32 x 32 latents, float32, without gradients.
``interleaved``: spatial and temporal blocks take turns, as in Latte. ``factorised``: both in every block, every frame
reading the first and the previous one. ``joint``: one attention over space and time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from dit_booth.models.clip import Text
from dit_booth.models.dit import DiTConfig, VideoDiT
from experiments.bench.measure import (
    conditions,
    interleaved,
    matmul_peak,
    own_peak,
    peak_of_process,
    write_lines,
)

FRAMES, CHANNELS, SIDE, WIDTH = 16, 4, 32, 768
CONFIGS = {
    "interleaved": DiTConfig(size="S", layout="interleaved", plan="self"),
    "factorised": DiTConfig(size="S"),
    "joint": DiTConfig(size="S", layout="joint", plan="all"),
}
# Latte's own code at this configuration on a quiet machine of two such cores: seconds, MiB.
LATTE = (1.78, 1051)
BAR = 1.2


@dataclass(frozen=True)
class Options:
    table: Path | None = None
    """Write this Markdown page, and the rows beside it under the same name."""
    threads: int = 2
    """Threads of the CPU."""
    rounds: int = 7
    """Runs of every job, in turn."""
    peak: str = ""
    """Run this one job twice and print the process's peak memory (what the bench starts for itself)."""


def job(name: str) -> Callable[[], Tensor]:
    """A network with random weights on one video; its forward pass."""
    torch.manual_seed(0)
    net = VideoDiT(CONFIGS[name], channels=CHANNELS, text_dim=WIDTH, text_embed_dim=WIDTH).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x, t = torch.randn(1, FRAMES, CHANNELS, SIDE, SIDE), torch.tensor([500.0])
    text = Text(torch.randn(1, 8, WIDTH), torch.randn(1, WIDTH))

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(x, t, text)
        return out

    return forward


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    if options.peak:
        run = job(options.peak)
        for _ in range(2):
            run()
        print(own_peak())
        return
    cpu = torch.device("cpu")
    before = matmul_peak(torch.float32, cpu)
    times = interleaved({name: job(name) for name in CONFIGS}, options.rounds, cpu)
    after = matmul_peak(torch.float32, cpu)
    peak = partial(peak_of_process, "experiments.bench.dit", threads=options.threads)
    rows = [
        {
            "job": name,
            "seconds": round(t.median, 3),
            "best": round(t.best, 3),
            "latte_over_it": round(LATTE[0] / t.median, 2),
            "peak_mib": round(peak(name)),
            "matmul_gflops": [round(f / 1e9, 1) for f in (before, after)],
            **conditions(cpu),
        }
        for name, t in times.items()
    ]
    for row in rows:
        print(json.dumps(row))
    if options.table:
        write_lines(options.table.with_suffix(".jsonl"), rows)
        options.table.write_text(page(rows))


def page(rows: list[dict[str, Any]]) -> str:
    """The table, for people."""
    first = rows[0]
    lines = [
        "# The video DiT's forward pass on the CPU",
        "",
        f"`python -m experiments.bench.dit --table docs/results/dit_cpu.md` on {first['device']}, {first['threads']}"
        f" threads, PyTorch {first['torch']}, load {first['load']}; float32, S/2, one video of {FRAMES} x {SIDE} x"
        f" {SIDE} latents, no gradients. A square matrix product ran at {first['matmul_gflops'][0]} GFLOP/s before and"
        f" {first['matmul_gflops'][1]} after. Times are medians of runs in turn.",
        f"Latte's own code took {LATTE[0]} s and {LATTE[1]} MiB on a quiet machine of this kind, not in this run; the"
        f" bar for its layout is {BAR} times as fast and no more memory.",
        "",
        "| layout | s | best s | Latte's time / it | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['job']} | {r['seconds']:.2f} | {r['best']:.2f} | {r['latte_over_it']} | {r['peak_mib']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
