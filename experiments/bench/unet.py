"""The video U-Net with VideoBooth's fine injection against its own plain pass, at a mid-size configuration.

    python -m experiments.bench.unet                                   # two threads, a few minutes
    python -m experiments.bench.unet --table docs/results/unet_cpu.md

``plain``: no image. ``fine``: the reference's own pass, then the video with K/V concat and VideoBooth's updated first
frame. ``guided``: one step of guidance as released: ``fine`` with the text, and ``plain`` without. Peak memory is the
resident set of a process of its own that runs the one job, as the original's was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor

from dit_booth.inject import Condition, Recorder, Reference, Site, Sites
from dit_booth.models.clip import Text
from dit_booth.models.unet import UNetConfig, VideoUNet
from dit_booth.strategy import Strategies
from experiments.bench.side_by_side import Options, Row, about, run
from strategies.kv_concat import KVConcat, KVConcatConfig

MODULE = "experiments.bench.unet"
CONFIG = UNetConfig(channels=(64, 128, 256, 256), text_dim=256)
FRAMES, SIDE, TOKENS = 16, 32, 77
# The original code on a quiet machine of two such cores, same configuration and shapes: seconds, MiB.
ORIGINAL = {"plain": (7.35, 2662), "fine": (22.0, 2712), "guided": (28.1, 2716)}
BARS = {"fine": 1.15, "guided": 2.2}  # of our own plain pass


class Bench:
    """The jobs: a U-Net with random weights, K/V concat on it, and one video's inputs."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = VideoUNet(CONFIG).eval()
        words = Site(name="text.words", port="prompt", role="words", dim=CONFIG.text_dim)
        sites = Sites((words, *self.net.sites()), 8, 8, CONFIG.in_channels, FRAMES)
        self.strategy = Strategies({"kv_concat": KVConcat(KVConcatConfig(), sites)}).eval()
        self.x = torch.randn(1, FRAMES, CONFIG.in_channels, SIDE, SIDE)
        self.t = torch.tensor([500.0])
        self.words, self.null = (torch.randn(1, TOKENS, CONFIG.text_dim) for _ in range(2))
        latent = torch.randn(1, 1, CONFIG.in_channels, SIDE, SIDE)
        self.reference = Reference(torch.ones(1, 3, 8, 8), (), torch.zeros(1, 8), latent, latent, self.record)

    def record(self, latent: Tensor, clean: bool, sites: Any) -> dict[str, Tensor]:
        recorder = Recorder(self.strategy.bind({"kv_concat": Condition()}), sites)
        self.net(latent, self.t, Text(self.null, self.null[:, -1]), recorder)
        return recorder.hidden

    @torch.no_grad()
    def plain(self, words: Tensor | None = None) -> Tensor:
        words = self.words if words is None else words
        return self.net(self.x, self.t, Text(words, words[:, -1]))

    @torch.no_grad()
    def fine(self) -> Tensor:
        conditions = self.strategy(replace(self.reference), ("kv_concat",))
        text = Text(self.words, self.words[:, -1])
        return self.net(self.x, self.t, text, self.strategy.bind(conditions))

    @torch.no_grad()
    def guided(self) -> Tensor:
        without = self.plain(self.null)
        return without + 4 * (self.fine() - without)

    def jobs(self) -> dict[str, Callable[[], Tensor]]:
        return {"plain": self.plain, "fine": self.fine, "guided": self.guided}


def job(name: str) -> Callable[[], Tensor]:
    """One of the jobs, with a U-Net of its own; all are equal."""
    return Bench().jobs()[name]


def more(row: Row) -> Row:
    """What the original code took, and the bar."""
    seconds, mib = ORIGINAL[row["job"]]
    return {
        "over_plain_bar": BARS.get(row["job"]),
        "original_seconds": seconds,
        "original_peak_mib": mib,
    }


def page(rows: list[Row]) -> str:
    """The table, for people."""
    lines = [
        "# The video U-Net on the CPU",
        "",
        about(rows[0], MODULE),
        "",
        f"One video of {FRAMES} x {SIDE} x {SIDE} latents, widths {CONFIG.channels}, text width {CONFIG.text_dim},"
        f" {TOKENS} tokens. The original's figures were taken on a quiet machine of this kind, not in this run.",
        "",
        "| job | s | best s | of plain | bar | peak MiB | original s | original of plain | original peak MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        bar = r["over_plain_bar"] or "-"
        theirs = r["original_seconds"] / ORIGINAL["plain"][0]
        lines.append(
            f"| {r['job']} | {r['seconds']:.2f} | {r['best']:.2f} | {r['over_first']:.2f} | {bar} | {r['peak_mib']}"
            f" | {r['original_seconds']} | {theirs:.2f} | {r['original_peak_mib']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jobs = {name: partial(job, name) for name in ORIGINAL}
    run(tyro.cli(Options, description=__doc__), MODULE, jobs, more, page)
