"""Print what a network costs: parameters, multiply-adds and FLOPs of a forward pass, and the memory of its training.

    dit-booth describe                                          # DiT's sizes as the paper counts them
    dit-booth describe --backbone wan --size 1.3b               # Wan 2.1 at 81 frames of 480 x 832
    dit-booth describe --backbone dit --size XL --data.frames 16 --strategy kv_concat
    dit-booth describe --backbone unet --strategy token_replacement+kv_concat --latents 4 32 32

All options of a run are understood, and two more: --size, of the backbone (Wan's large ones bring its text encoder, its
autoencoder and 81 frames), and --latents: channels, height and width of a frame's latents. Memory is that of each
stage, one video on each GPU; text encoder and autoencoder are left out, as on encoded data (dit-booth data cache).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_booth.config import RunConfig

LATENTS = (4, 32, 32)
WAN_LATENTS = (16, 60, 104)
WAN = ("--autoencoder.kind", "wan", "--text.kind", "umt5", "--data.frames", "81")


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: printed; 1: settings that cannot work, said in one line."""
    from dit_booth.cost.describe import table_of_run, table_of_sizes
    from dit_booth.training.memory import table_of_memory

    try:
        config, latents = parse_network(argv, prog)
        lines = (
            table_of_run(config, latents) + table_of_memory(config, latents)
            if config
            else table_of_sizes(latents)
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def parse_network(
    argv: Sequence[str], prog: str | None = None
) -> tuple[RunConfig | None, tuple[int, int, int]]:
    """Return the run (none: no option of one was given) and the latents. ValueError: settings that cannot work."""
    from dit_booth.config.parse import parse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--latents", type=int, nargs=3, metavar=("C", "H", "W"))
    first.add_argument("--size", default="")
    first.add_argument("--backbone", default="")
    given, rest = first.parse_known_args(list(argv))
    large = given.backbone == "wan" and given.size not in ("", "nano")
    latents = tuple(given.latents or (WAN_LATENTS if large else LATENTS))
    if given.size:
        rest = [f"--{given.backbone or 'dit'}.size", given.size, *rest]
    if given.backbone:
        rest = ["--backbone", given.backbone, *(WAN if large else ()), *rest]
    return (parse(rest, description=__doc__ or "", prog=prog) if rest else None), latents
