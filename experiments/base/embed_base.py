"""Put a finished base run into the package: the backbone as an asset of its own, the text tower into the tiny CLIP.

python experiments/base/embed_base.py runs/base-dit
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor

from dit_booth.models.weights import ASSETS, part, read, write


def main(folder: Path) -> None:
    """Write weights in float16 under dit_booth/assets/, every 25th line of the log under docs/results/.

    ValueError: the run is not finished.
    """
    if not (folder / "finished").is_file():
        raise ValueError(f"{folder} is not a finished run; run it to its end first")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    state = read(folder / "weights.safetensors")
    write(
        ASSETS / f"{settings['backbone']}.safetensors",
        half({name: value for name, value in state.items() if name.startswith("backbone.")}),
        {"schedule": "+".join(settings["schedule"]), "seed": str(settings["train"]["seed"])},
    )
    clip = ASSETS / "clip.safetensors"
    write(clip, half(read(clip) | part(state, "text.")))
    log = Path("docs/results") / f"base_{settings['backbone']}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(line for i, line in enumerate(lines) if i % 25 == 0 or '"samples"' in line))
    for file in sorted(ASSETS.glob("*.safetensors")):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors to float16."""
    return {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in state.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
