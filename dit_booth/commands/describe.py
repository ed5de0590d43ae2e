"""Print what a network costs: its parameters, and the multiply-adds and FLOPs of one forward pass.

    dit-booth describe                                          # DiT's sizes as the paper counts them
    dit-booth describe --backbone dit --dit.size XL --data.frames 16 --strategy kv_concat
    dit-booth describe --backbone unet --strategy token_replacement+kv_concat --latents 4 32 32

All options of a run are understood, and --latents: channels, height and width of a frame's latents.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: printed; 1: settings that cannot work, said in one line."""
    from dit_booth.config.parse import parse
    from dit_booth.cost.describe import table_of_run, table_of_sizes

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--latents", type=int, nargs=3, default=(4, 32, 32), metavar=("C", "H", "W"))
    given, rest = first.parse_known_args(list(argv))
    try:
        config = parse(rest, description=__doc__ or "", prog=prog) if rest else None
        lines = table_of_run(config, given.latents) if config else table_of_sizes(given.latents)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
