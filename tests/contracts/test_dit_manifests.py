"""Names and shapes: DiT-XL/2's official files at full size are ours through the maps; our default keeps its own."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_booth.config.parse import parse
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.upstream.dit import (
    from_official,
    infer_channels,
    infer_config,
    inflate,
    is_official_dit,
    to_official,
)
from dit_booth.models.weights import ASSETS, load_strictly, part, read

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
EXPECTED = [0.207828, 0.265257, 0.328451, 0.887705, 0.222209, 0.379597]


def manifest(name: str) -> dict[str, Tensor]:
    """The tensors of a file, without values."""
    lines = gzip.decompress((Path(__file__).parent / "manifests" / f"{name}.txt.gz").read_bytes()).decode()
    pairs = [line.split(" ") for line in lines.splitlines()]
    return {key: torch.empty([int(n) for n in shape.split("x")], device="meta") for key, shape in pairs}


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize(("name", "side"), [("dit_xl2_256", 16), ("dit_xl2_512", 32)])
def test_dit_xl2_loads_strictly_and_is_exported_as_it_was(name: str, side: int) -> None:
    official = manifest(name)
    assert is_official_dit(official)
    count = sum(math.prod(s) for key, s in shapes(official).items() if key != "pos_embed")
    assert (len(official), count) == (292, 674_834_720), "675 M, as in table 1"
    state = from_official(official)
    config, channels = infer_config(state), infer_channels(state)
    assert config == DiTConfig(
        depth=28,
        hidden=1152,
        heads=16,
        patch=2,
        layout="image",
        plan="self",
        conditioning="class_label",
        classes=1000,
    )
    assert channels == (4, 8)
    with torch.device("meta"):
        dit = VideoDiT(config, channels=4, out_channels=8, text_dim=1, text_embed_dim=1)
    load_strictly(dit, state, name)
    assert shapes(to_official(dit.state_dict(), height=side, width=side)) == shapes(official)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "cross_attention"])
@pytest.mark.parametrize("layout", ["factorised", "joint"])
def test_dit_xl2_inflates_to_every_parameter_of_a_video_model(conditioning: str, layout: str) -> None:
    plan = "all" if layout == "joint" else "first+previous"
    config = DiTConfig(size="XL", layout=layout, plan=plan, conditioning=conditioning)  # type: ignore[arg-type]
    with torch.device("meta"):
        dit = VideoDiT(config, channels=4, text_dim=768, text_embed_dim=768)
        state = inflate(from_official(manifest("dit_xl2_256")), dit.state_dict(), config)
    load_strictly(dit, state, "XL/2")


def test_the_default_model_keeps_its_names_and_shapes() -> None:
    dit = VideoDiT(DiTConfig(), channels=27, text_dim=8, text_embed_dim=128)
    assert shapes(dit.state_dict()) == shapes(manifest("dit_nano"))
    assert {name for name, _ in dit.named_parameters()} == set(manifest("dit_nano"))


@torch.no_grad()
def test_the_default_model_keeps_its_function() -> None:
    """With seeded weights, what the first version of this model computed; the base in the package may be retrained.

    At small timesteps: the phases of large ones, in float32, differ from one processor's exponential to another's.
    """
    dit = VideoDiT(DiTConfig(), channels=3, text_dim=8, text_embed_dim=6)
    generator = torch.Generator().manual_seed(0)
    for _, p in sorted(dit.named_parameters()):
        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    x = torch.randn(2, 3, 3, 4, 6, generator=generator)
    text = Text(torch.zeros(2, 1, 8), torch.randn(2, 6, generator=generator))
    out = dit(x, torch.tensor([40.0, 7.0]), text)
    expected = torch.tensor(EXPECTED)
    assert (out[:, :, 0, 0, 0].flatten() - expected).abs().max() < 3e-6


def test_the_embedded_base_loads() -> None:
    config = parse(["--config", str(ROOT / "experiments/configs/toyworld.yaml")]).dit
    state = part(read(ASSETS / "dit.safetensors"), "backbone.")
    channels, pooled = state["x_embedder.proj.weight"].shape[1], state["text_embedder.weight"].shape[1]
    load_strictly(VideoDiT(config, channels=channels, text_dim=8, text_embed_dim=pooled), state, "base")
