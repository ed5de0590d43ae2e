"""The video U-Net with VideoBooth's fine injection against its own plain pass, at a mid-size configuration.

    python -m experiments.bench.unet                                   # two threads, a few minutes
    python -m experiments.bench.unet --table docs/results/unet_cpu.md

``plain``: no image. ``fine``: the reference's own pass, then the video with K/V concat and VideoBooth's updated first
frame. ``guided``: one step of guidance as released: ``fine`` with the text, and without text and image a pass with the
trained keys and values alone. ``guided, zero image``: our default, whose unconditional half reads the zero image, as
training did. Peak memory is the resident set of a process of its own that runs the one job, as the original's was.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import tyro
from dit_booth.strategies.kv_concat import KVConcat, KVConcatConfig
from torch import Tensor

from dit_booth.inject import Recorder, Reference, Site, Sites
from dit_booth.models.clip.encoders import Text
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.strategy import Strategies
from experiments.bench.side_by_side import Row, SideBySideArguments, about, run

MODULE = "experiments.bench.unet"
CONFIG = UNetConfig(channels=(64, 128, 256, 256), text_dim=256)
FRAMES, SIDE, TOKENS = 16, 32, 77
NAMES = ("kv_concat",)
# The original code on a quiet machine of two such cores, same configuration and shapes: seconds, MiB.
ORIGINAL = {"plain": (7.35, 2662), "fine": (22.0, 2712), "guided": (28.1, 2716)}
BARS = {"fine": 1.15, "guided": 2.2}  # of our own plain pass
PEAK_BAR = 0.6  # of the original's, for `fine`


class UNetBench:
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
        self.reference = Reference(torch.ones(1, 3, 8, 8), (), torch.zeros(1, 8), latent)

    def record(self) -> dict[str, Tensor]:
        """Run the reference's own pass; return its hidden states."""
        recorder = Recorder(self.strategy.bind(NAMES), self.strategy.part("kv_concat").needs().sites)
        self.net(self.reference.latent, self.t, Text(self.null, self.null[:, -1]), recorder)
        return recorder.hidden

    def plain(self) -> Tensor:
        output: Tensor = self.net(self.x, self.t, Text(self.words, self.words[:, -1]))
        return output

    def fine(self, words: Tensor | None = None) -> Tensor:
        words = self.words if words is None else words
        conditions = self.strategy(self.reference, {"matched": self.record()}, NAMES)
        taps = self.strategy.bind(NAMES, conditions)
        output: Tensor = self.net(self.x, self.t, Text(words, words[:, -1]), taps)
        return output

    def guided(self) -> Tensor:
        taps = self.strategy.bind(NAMES)
        without: Tensor = self.net(self.x, self.t, Text(self.null, self.null[:, -1]), taps)
        return without + 4 * (self.fine() - without)

    def guided_by_zero_image(self) -> Tensor:
        without = self.fine(self.null)  # another image costs the same
        return without + 4 * (self.fine() - without)

    def jobs(self) -> dict[str, Callable[[], Tensor]]:
        return {
            "plain": self.plain,
            "fine": self.fine,
            "guided": self.guided,
            "guided, zero image": self.guided_by_zero_image,
        }


def job(name: str) -> Callable[[], Tensor]:
    """One of the jobs, with a U-Net of its own; all are equal."""
    return torch.no_grad()(UNetBench().jobs()[name])


def more(row: Row) -> Row:
    """Return the original code's figures for the same job, and the bar."""
    seconds, mib = ORIGINAL.get(row["job"], (None, None))
    share = round(row["peak_mib"] / mib, 2) if mib else None
    return {
        "over_plain_bar": BARS.get(row["job"]),
        "original_seconds": seconds,
        "original_peak_mib": mib,
        "peak_over_original": share,
    }


def page(rows: list[Row]) -> str:
    """The table, for people."""
    lines = [
        "# The video U-Net on the CPU",
        "",
        about(rows[0], MODULE),
        "",
        f"One video of {FRAMES} x {SIDE} x {SIDE} latents, widths {CONFIG.channels}, text width {CONFIG.text_dim},"
        f" {TOKENS} tokens. The original was measured on a quiet machine of this kind in another run.",
        "",
        f"Targets: `plain` no slower than the original, `fine` at most {BARS['fine']} of `plain`, `guided` at most"
        f" {BARS['guided']}, the peak of `fine` at most {PEAK_BAR} of the original's.",
        "",
        "| job | s | best s | of plain | matmul GFLOP/s | peak MiB | of original's | original s | of its plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        theirs = r["original_seconds"]
        ours = f"| {r['job']} | {r['seconds']:.2f} | {r['best']:.2f} | {r['over_first']:.2f}"
        machine = f"| {r['matmul_gflops'][0]} to {r['matmul_gflops'][1]} | {r['peak_mib']}"
        original = (
            f"{r['peak_over_original']} | {theirs} | {theirs / ORIGINAL['plain'][0]:.2f}"
            if theirs
            else "- | - | -"
        )
        lines.append(f"{ours} {machine} | {original} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jobs = {name: partial(job, name) for name in (*ORIGINAL, "guided, zero image")}
    run(tyro.cli(SideBySideArguments, description=__doc__), MODULE, jobs, more, page)
