"""Put the strategies of a finished run into the package, as the adapter that ``dit_booth.load("toyworld")`` loads.

python experiments/base/embed_adapter.py runs/adapter-dit
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from dit_booth.components import build
from dit_booth.config import RunConfig
from dit_booth.models.weights import ASSETS, load_strictly, read, write
from dit_booth.pipeline import EMBEDDED

NAMES = {"dit": "toyworld", "unet": "toyworld-unet"}


def main(folder: Path) -> None:
    """Write the adapter in float16 with its metadata, and every 25th line of its log under docs/results/.

    ValueError: the run is not finished, or is not one of configs/toyworld_adapter.yaml.
    """
    if not (folder / "finished").is_file():
        raise ValueError(f"{folder} is not a finished run; run it to its end first")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    backbone = settings["backbone"]
    steps = {name: {"steps": settings["stages"][name]["steps"]} for name in ("coarse", "fine")}
    components = build(RunConfig.create("toyworld_adapter", backbone=backbone, stages=steps))
    state = read(folder / "strategy.safetensors")
    load_strictly(components.model.strategy, state, str(folder))
    half = {name: value.to(torch.float16) for name, value in state.items()}
    write(ASSETS / EMBEDDED[NAMES[backbone]], half, components.adapter_metadata())
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    log = Path("docs/results") / f"adapter_{backbone}.jsonl"
    log.write_text("".join(line for i, line in enumerate(lines) if i % 25 == 0 or '"samples"' in line))
    for asset in sorted(ASSETS.glob("*.safetensors")):
        print(f"{asset}: {asset.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
