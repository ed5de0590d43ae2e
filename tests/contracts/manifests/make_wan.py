"""Writes the manifests of Wan 2.1 at full size: names and shapes of diffusers' class on the meta device.

    .venv/bin/python tests/contracts/manifests/make_wan.py

Nothing is downloaded; the sizes are those of the released ``config.json`` files.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import official  # noqa: E402


def main() -> None:
    for name, settings in official.RELEASED_WAN.items():
        with torch.device("meta"):
            state = official.wan(**settings).state_dict()
        lines = [f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in sorted(state.items())]
        text = "\n".join(lines) + "\n"
        (HERE / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        count = sum(tensor.numel() for tensor in state.values())
        sys.stdout.write(f"{name}: {len(lines)} tensors, {count:,} parameters\n")


if __name__ == "__main__":
    main()
