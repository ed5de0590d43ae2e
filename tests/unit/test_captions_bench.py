"""The check of captions finds the truth in the toy world's own videos, and the contrary in them played backwards."""

from __future__ import annotations

import pytest

from dit_booth.cli import parse
from experiments.bench import captions


@pytest.mark.parametrize("way", captions.WAYS)
def test_the_toy_world_follows_its_captions(way: str) -> None:
    config = parse(["--config", "experiments/configs/toyworld_base.yaml", "--data.describe=full"])
    world = config.data.build(heldout=True)
    named = [example for i in range(120) if f" {way} " in (example := world[i]).caption]
    assert len(named) > 5
    assert all(captions.shape_of(example.video, example.subject).right for example in named)
    for example in named:
        assert captions.follows(way, example.video)
        assert not captions.follows(way, example.video.flip(0))
