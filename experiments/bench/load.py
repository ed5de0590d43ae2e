"""Peak host memory of loading a folder of Wan's network, of 200 M parameters, up to the first forward pass.

    python -m experiments.bench.load

Diffusers writes the folder, in shards. A fresh process builds a run from it (`components.build`, as every command does)
and runs one forward pass. Its resident memory counts from after the imports, pages of mapped files included.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from dit_booth.components import Components, build
from dit_booth.config.parse import parse
from dit_booth.cost.describe import inputs
from experiments.bench.measure import own_peak, peak_of_process

MODULE = "experiments.bench.load"
BAR = 1.2  # times the weights
MIB = 2**20
SIZES = {"depth": 12, "hidden": 1024, "heads": 16, "ffn": 4096}
CHANNELS, TEXT = 12, 128  # of the toy world's latents and text encoder
SHARD = "250MB"


@dataclass(frozen=True, kw_only=True)
class LoadArguments:
    threads: int = 1
    peak: str = ""
    """Load this folder, and print the MiB that it took (the bench starts this itself)."""


def write_folder(folder: Path) -> int:
    """Write random weights by diffusers' class, in shards; return their bytes."""
    from diffusers import WanTransformer3DModel

    made: Any = WanTransformer3DModel
    made(
        num_layers=SIZES["depth"],
        num_attention_heads=SIZES["heads"],
        attention_head_dim=SIZES["hidden"] // SIZES["heads"],
        ffn_dim=SIZES["ffn"],
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
    ).save_pretrained(folder, max_shard_size=SHARD)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def components_from(weights: str, **sizes: int) -> Components:
    """Build a run of the toy world with Wan's network of these sizes: pixels of 2 x 2 as latents, CLIP's text."""
    flags = [word for name, n in sizes.items() for word in (f"--wan.{name}", str(n))]
    toyworld = ("--config", "toyworld", "--strategy", "none", "--backbone", "wan")
    return build(parse([*toyworld, "--weights", weights, *flags]))


@torch.no_grad()
def peak_of_loading(folder: str) -> float:
    """Return the MiB that a run from the folder adds to a process that has built a small one before."""
    components_from("none")
    before = own_peak()
    components = components_from(folder, **SIZES)
    x, t, _ = inputs((1, 1, CHANNELS, 8, 8), "cpu")
    components.model(x, t, components.tokenize(["a star"], [None]))
    return own_peak() - before


def main(settings: LoadArguments) -> int:
    """0: the bar is met; 1: it is not."""
    torch.set_num_threads(settings.threads)
    if settings.peak:
        print(peak_of_loading(settings.peak))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        size = write_folder(Path(folder)) / MIB
        peak = peak_of_process(MODULE, folder, settings.threads)
    print(f"weights {size:.0f} MiB, peak {peak:.0f} MiB: {peak / size:.3f} times (bar {BAR})")
    return int(peak > BAR * size)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(LoadArguments, description=__doc__)))
