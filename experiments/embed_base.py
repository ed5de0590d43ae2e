"""Put a finished base run into the package: dit_booth/assets/<backbone>.safetensors in float16, and its log beside.

python experiments/embed_base.py runs/base-dit
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from dit_booth.models.weights import ASSETS, read, write


def main(folder: Path) -> None:
    """ValueError where the run is not finished."""
    if not (folder / "finished").is_file():
        raise ValueError(f"{folder} is not a finished run; run it to its end first")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    state = {name: value.to(torch.float16) for name, value in read(folder / "weights.safetensors").items()}
    file = ASSETS / f"{settings['backbone']}.safetensors"
    write(file, state, {"schedule": "+".join(settings["schedule"]), "seed": str(settings["train"]["seed"])})
    log = Path("docs/results") / f"base_{settings['backbone']}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    log.write_text("".join(line for i, line in enumerate(lines) if i % 25 == 0 or '"samples"' in line))
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB; log {log}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
