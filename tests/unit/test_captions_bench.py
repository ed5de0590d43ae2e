"""The check of captions finds the truth in the toy world's own videos, and the contrary in them played backwards."""

from __future__ import annotations

import json

import pytest
import torch

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.data.example import Example
from experiments.bench import captions


@pytest.fixture(scope="module")
def heldout() -> list[Example]:
    config = parse(["--config", "experiments/configs/toyworld_base.yaml", "--data.toyworld.describe=full"])
    world = config.data.build("dev")
    return [world[i] for i in range(120)]


@pytest.mark.parametrize("way", captions.WAYS)
def test_the_toy_world_follows_its_captions(way: str, heldout: list[Example]) -> None:
    named = [example for example in heldout if f" {way} " in example.caption][:6]
    assert len(named) == 6
    assert all(captions.shape_of(example.video, example.subject).right for example in named)
    for example in named:
        assert captions.follows(way, example.video)
        assert not captions.follows(way, example.video.flip(0))


def test_it_asks_for_so_many_of_each_motion_and_judges_what_is_sampled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the toy world's own videos in the place of the samples, all are right."""
    monkeypatch.setattr(
        captions, "sampled", lambda components, asked, batch: [example.video for _, example in asked]
    )
    captions.main(captions.CaptionsArguments(each=2, spinning=3, weights="none"))
    row = json.loads(capsys.readouterr().out)
    assert (row["videos"], row["right"], row["moving up"]) == (12, 12, 2)
    assert row["shapes_right"] == 12 and row["spinning"]["shapes_right"] == 3
    assert {name: row[name] for name in row["truth"]} == row["truth"]


def test_samples_come_in_the_order_of_the_captions_whatever_the_batch() -> None:
    flags = ["--data.toyworld.describe=full", "--data.frames=2", "--data.size=16", "--sampler.steps=2"]
    components = build(
        parse(["--config", "experiments/configs/toyworld_base.yaml", "--weights=embedded", *flags])
    )
    asked = captions.ask(components, {"growing": 1, "spinning": 2})
    assert [motion for motion, _ in asked] == ["growing", "spinning", "spinning"]
    assert all(f" {motion} " in example.caption for motion, example in asked)
    two, three = (torch.stack(list(captions.sampled(components, asked, batch))) for batch in (2, 3))
    assert two.shape == (3, 2, 3, 16, 16)
    torch.testing.assert_close(two, three, atol=1e-4, rtol=0)
