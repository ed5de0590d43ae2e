"""Writes the manifests of DiT's official files, by the paper's table 1 and the golden files' names, and of our default.

    .venv/bin/python tests/contracts/manifests/make_dit.py

DiT-XL/2 has 675 M parameters in the paper; the names are those of the golden files (`dit_sigma`), which the original
code wrote. ``dit_nano`` has the names and shapes that a default `VideoDiT` must keep.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Mapping
from pathlib import Path

from dit_booth.models.dit.model import DiTConfig, VideoDiT

HERE = Path(__file__).parent
Shape = tuple[int, ...]


def official(depth: int, hidden: int, side: int, patch: int, *, classes: int = 1000) -> dict[str, Shape]:
    """Names and shapes of DiT for latents of side x side x 4, with the predicted variance."""
    layers = {
        "t_embedder.mlp.0": (hidden, 256),
        "t_embedder.mlp.2": (hidden, hidden),
        "final_layer.linear": (patch * patch * 8, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
        "x_embedder.proj": (hidden, 4, patch, patch),
    }
    for i in range(depth):
        layers |= {
            f"blocks.{i}.attn.qkv": (3 * hidden, hidden),
            f"blocks.{i}.attn.proj": (hidden, hidden),
            f"blocks.{i}.mlp.fc1": (4 * hidden, hidden),
            f"blocks.{i}.mlp.fc2": (hidden, 4 * hidden),
            f"blocks.{i}.adaLN_modulation.1": (6 * hidden, hidden),
        }
    shapes: dict[str, Shape] = {
        "pos_embed": (1, (side // patch) ** 2, hidden),
        "y_embedder.embedding_table.weight": (classes + 1, hidden),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def write(name: str, shapes: Mapping[str, Shape]) -> None:
    text = "".join(f"{key} {'x'.join(map(str, shape))}\n" for key, shape in sorted(shapes.items()))
    (HERE / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    sys.stdout.write(f"{name}: {len(shapes)} tensors\n")


def main() -> None:
    write("dit_xl2_256", official(28, 1152, 32, 2))
    write("dit_xl2_512", official(28, 1152, 64, 2))
    dit = VideoDiT(DiTConfig(), channels=27, text_dim=8, text_embed_dim=128)
    write("dit_nano", {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()})


if __name__ == "__main__":
    main()
