"""The check of directions finds the truth in the toy world's own videos, and the contrary in them played backwards."""

from __future__ import annotations

import pytest

from dit_booth.cli import parse
from experiments.bench import directions


@pytest.mark.parametrize("way", directions.WAYS)
def test_the_toy_world_follows_its_captions(way: str) -> None:
    config = parse(["--config", "experiments/configs/toyworld_base.yaml", "--data.describe=full"])
    world = config.data.build(heldout=True)
    named = [example for i in range(120) if f" {way} " in (example := world[i]).caption]
    assert len(named) > 5
    for example in named:
        assert directions.follows(way, example.video)
        assert not directions.follows(way, example.video.flip(0))
