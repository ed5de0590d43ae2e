"""Put the strategies of a finished run into the package, as the adapter that ``dit_booth.load("toyworld")`` loads.

python experiments/base/embed_adapter.py runs/adapter-dit
python experiments/base/embed_adapter.py runs/adapter-unet --backbone unet
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

import torch

from dit_booth.components import build
from dit_booth.config import RunConfig
from dit_booth.models.weights import ASSETS, load_strictly, read, write
from dit_booth.pipeline import EMBEDDED

NAMES = {"dit": "toyworld", "unet": "toyworld-unet"}


def main(folder: Path, backbone: Literal["dit", "unet"]) -> None:
    """Write the adapter in float16 with its metadata, and every 25th line of its log under docs/results/.

    ValueError: the run is not finished, or is not one of configs/toyworld_adapter.yaml.
    """
    if not (folder / "finished").is_file():
        raise ValueError(f"{folder} is not a finished run; run it to its end first")
    components = build(RunConfig.create("toyworld_adapter", backbone=backbone))
    state = read(folder / "strategy.safetensors")
    load_strictly(components.model.strategy, state, str(folder))
    file = ASSETS / EMBEDDED[NAMES[backbone]]
    half = {name: value.to(torch.float16) for name, value in state.items()}
    write(file, half, components.adapter_metadata())
    log = Path("docs/results") / f"adapter_{backbone}.jsonl"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(line for i, line in enumerate(lines) if i % 25 == 0 or '"samples"' in line))
    for asset in sorted(file.parent.glob("*.safetensors")):
        print(f"{asset}: {asset.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of the finished run")
    parser.add_argument("--backbone", choices=("dit", "unet"), default="dit")
    given = parser.parse_args()
    main(given.folder, given.backbone)
