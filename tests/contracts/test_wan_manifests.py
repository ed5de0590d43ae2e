"""Names and shapes of Wan 2.1 at full size are ours, by diffusers' and by the original's names (make_wan.py)."""

from __future__ import annotations

import gzip
from pathlib import Path

import official
import pytest
import torch
from torch import Tensor

from dit_booth.models.upstream.wan import find_wan_mismatches, from_original, from_original_settings
from dit_booth.models.wan.model import VideoWan, WanConfig

PARAMETERS = {
    "wan_1.3b": (825, 1_418_996_800),
    "wan_14b": (1095, 14_288_491_584),
    "wan_14b_image": (1303, 16_394_878_784),
}
CONFIGS = {
    "wan_1.3b": WanConfig(size="1.3b"),
    "wan_14b": WanConfig(size="14b"),
    "wan_14b_image": WanConfig(size="14b", image_dim=1280, condition_channels=20),
}
ORIGINAL_13B = {
    "dim": 1536,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_dim": 16,
    "num_heads": 12,
    "num_layers": 30,
}
"""Of the original's config.json; it leaves out what its class defaults to."""


def manifest(name: str) -> dict[str, Tensor]:
    """The tensors of a file, without values."""
    lines = gzip.decompress((Path(__file__).parent / "manifests" / f"{name}.txt.gz").read_bytes()).decode()
    pairs = [line.split(" ") for line in lines.splitlines()]
    return {key: torch.empty([int(n) for n in shape.split("x")], device="meta") for key, shape in pairs}


@pytest.mark.parametrize("name", CONFIGS)
def test_wan_at_full_size(name: str) -> None:
    files = manifest(name)
    assert (len(files), sum(tensor.numel() for tensor in files.values())) == PARAMETERS[name]
    with torch.device("meta"):
        own = VideoWan(CONFIGS[name], channels=16, text_dim=4096).state_dict()
    expected = {key: tensor.shape for key, tensor in own.items()}
    assert {key: tensor.shape for key, tensor in files.items()} == expected
    renamed = from_original(official.original_wan(files))
    assert {key: tensor.shape for key, tensor in renamed.items()} == expected
    settings = official.RELEASED_WAN[name]
    assert find_wan_mismatches(settings, CONFIGS[name], channels=16, text_dim=4096) == []


def test_the_originals_settings_are_the_same_ones() -> None:
    names = official.original_wan(manifest("wan_1.3b"))
    settings = from_original_settings(ORIGINAL_13B, names)
    released = official.RELEASED_WAN["wan_1.3b"]
    assert {key: settings[key] for key in released} == released
    assert find_wan_mismatches(settings, CONFIGS["wan_1.3b"], channels=16, text_dim=4096) == []
    image = from_original_settings({"in_dim": 36}, official.original_wan(manifest("wan_14b_image")))
    assert find_wan_mismatches(image, CONFIGS["wan_14b_image"], channels=16, text_dim=4096) == []
