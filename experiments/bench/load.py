"""Peak host memory of loading a folder of Wan's network, of 200 M parameters, up to the first forward pass.

    python -m experiments.bench.load

Diffusers writes the folder, in shards. A fresh process builds a run from it (`components.build`, as every command does) and
runs one forward pass. Its resident memory counts from after the imports, pages of mapped files included.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.cost.describe import inputs
from experiments.bench.measure import own_peak, peak_of_process

MODULE = "experiments.bench.load"
BAR = 1.2  # times the weights
MIB = 2**20
CHANNELS, TEXT = 12, 128  # of the toy world's latents and text encoder


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    depth: int = 12
    hidden: int = 1024
    ffn: int = 4096
    shard: str = "250MB"
    """Most bytes of a shard."""
    threads: int = 1
    peak: str = ""
    """Load this folder, and print the MiB that it took (the bench starts this itself)."""

    @property
    def flags(self) -> list[str]:
        """Options of the toy world's run with this network: pixels of 2 x 2 as latents, CLIP's text."""
        sizes = {"depth": self.depth, "hidden": self.hidden, "ffn": self.ffn, "heads": self.hidden // 64}
        wan = [word for name, n in sizes.items() for word in (f"--wan.{name}", str(n))]
        return ["--config", "toyworld", "--strategy", "none", "--backbone", "wan", *wan]


def write_folder(settings: LoadArguments, folder: Path) -> int:
    """Write random weights by diffusers' class, in shards; return their bytes."""
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel(
        num_layers=settings.depth,
        num_attention_heads=settings.hidden // 64,
        attention_head_dim=64,
        ffn_dim=settings.ffn,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
    ).save_pretrained(folder, max_shard_size=settings.shard)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def peak_of_loading(flags: Sequence[str], folder: str) -> float:
    """Return the MiB that a run from the folder adds to a process that has built a small one before."""
    build(parse(["--config", "toyworld", "--strategy", "none", "--backbone", "wan", "--weights", "none"]))
    before = own_peak()
    components = build(parse([*flags, "--weights", folder]))
    x, t, _ = inputs((1, 1, CHANNELS, 8, 8), "cpu")
    components.model(x, t, components.tokenize(["a star"], [None]))
    return own_peak() - before


def main(settings: LoadArguments) -> int:
    """0: the bar is met; 1: it is not."""
    torch.set_num_threads(settings.threads)
    if settings.peak:
        print(peak_of_loading(settings.flags, settings.peak))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(settings, Path(folder)) / MIB
        peak = peak_of_process(MODULE, folder, settings.threads)
    print(f"weights {size:.0f} MiB, peak {peak:.0f} MiB: {peak / size:.3f} times (bar {BAR})")
    return int(peak > BAR * size)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LoadArguments, description=__doc__)))
