"""Where the golden tensors are, and how to read them.

A clone holds the small ones in tests/golden/data/; a full working place also has ../shared/golden/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent


class GoldenError(ValueError):
    """A golden file that cannot be read or run."""


def golden_dirs() -> list[Path]:
    """The folders that may hold golden files and exist, in the order they are searched."""
    candidates = [HERE / "data", HERE.parents[2] / "shared" / "golden"]
    return [folder for folder in candidates if folder.is_dir()]


def golden_files() -> dict[str, Path]:
    """Name -> the .safetensors of every golden file; that of the first folder that has it."""
    found = [path for folder in golden_dirs() for path in sorted(folder.glob("*.safetensors"))]
    return {path.stem: path for path in reversed(found)}


def has(name: str) -> bool:
    """Whether both files of `name` are there."""
    return name in golden_files()


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of golden file `name`. Raises GoldenError, FileNotFoundError."""
    if not has(name):
        raise FileNotFoundError(f"{name}.safetensors is in none of {[str(d) for d in golden_dirs()]}")
    return read(golden_files()[name])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors, `path` being the .safetensors file. Raises GoldenError."""
    try:
        info = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise GoldenError(f"cannot be read: {error}") from error
    if not isinstance(info, dict) or not any(key.startswith("outputs.") for key in tensors):
        raise GoldenError(
            "unknown format: a golden file is a json object, and tensors outputs.* among others"
        )
    return info, tensors
