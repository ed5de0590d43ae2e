"""Where the golden tensors are, and how to read them.

A clone holds the small ones in tests/golden/data/; a full working place also has ../shared/golden/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


def golden_dirs() -> list[Path]:
    """The folders that may hold golden files and exist, in the order they are searched."""
    candidates = [HERE / "data", HERE.parents[2] / "shared" / "golden"]
    return [folder for folder in candidates if folder.is_dir()]


def has(name: str) -> bool:
    """Whether both files of `name` are there."""
    return any(_complete(folder, name) for folder in golden_dirs())


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of golden case file `name`. Raises FileNotFoundError."""
    for folder in golden_dirs():
        if _complete(folder, name):
            return json.loads((folder / f"{name}.json").read_text()), load_file(
                folder / f"{name}.safetensors"
            )
    raise FileNotFoundError(
        f"{name}.json and {name}.safetensors are in none of {[str(d) for d in golden_dirs()]}"
    )


def _complete(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{suffix}").is_file() for suffix in ("json", "safetensors"))
