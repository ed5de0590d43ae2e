"""The base trainer: its pool is the data set, its stages train what run.py would, and a run folder is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.models.weights import ASSETS, read
from experiments.base import toyworld_base as base

CONFIG = "experiments/configs/toyworld_base.yaml"


def test_the_pool_is_the_data_set_for_any_number_of_processes() -> None:
    config = parse(["--config", CONFIG])
    components = build(config)
    one, three = (base.VideoPool.render(config, components, 12, n) for n in (1, 3))
    assert torch.equal(one.videos, three.videos) and torch.equal(one.ids, three.ids)
    world = config.data.build()
    for i in (0, 7, 11):
        assert (one.videos[i].float() / 127.5 - 1 - world[i].video).abs().max() < 0.6 / 127.5
        assert torch.equal(one.ids[i : i + 1], components.model.text.tokenize([world[i].caption]).ids)


def test_favoured_words_are_drawn_as_much_more_often() -> None:
    captions = [
        "a star is spinning on sand",
        "a ring is spinning on sand",
        "a star is resting on sand",
        "a ring",
    ]
    odds = base.odds(captions, {"spinning": 3, "star": 2})
    assert odds == [6, 3, 2, 1]
    torch.manual_seed(0)
    cumulative = torch.tensor(odds, dtype=torch.float64).cumsum(0) / 12
    pool = base.VideoPool(torch.empty(4, 0), torch.empty(4, 0), cumulative)
    shares = torch.bincount(pool.draw(60_000), minlength=4) / 60_000
    torch.testing.assert_close(shares, torch.tensor(odds) / 12, atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="'spining' 3"):
        base.odds(captions, {"spining": 3})
    with pytest.raises(ValueError, match="over 0"):
        base.odds(captions, {"star": 0})


def test_a_run_trains_its_stages_and_leaves_a_folder(tmp_path: Path) -> None:
    flags = ("stages.images.steps=3", "stages.base.steps=2", "train.batch-size=2", "data.frames=3")
    base.main(
        base.BaseArguments(out=str(tmp_path), pool=8, processes=2, muon=3, set=(*flags, "weights=embedded"))
    )
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("images", 3), ("base", 2)]
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert settings["stages"]["images"]["steps"] == 3 and (tmp_path / "finished").is_file()
    trained, start = read(tmp_path / "weights.safetensors"), read(ASSETS / "dit.safetensors")
    moved = [name for name, value in start.items() if not torch.equal(trained[name], value.float())]
    assert len(moved) > len(start) // 2
    clip = {f"text.{name}": value.float() for name, value in read(ASSETS / "clip.safetensors").items()}
    towers = [name for name in trained if name in clip]
    assert towers and all(torch.equal(trained[name], clip[name]) for name in towers)  # frozen


def test_the_learning_rate_and_the_average_follow_the_stage() -> None:
    config = parse(["--config", CONFIG, "--train.batch-size=2", "--stages.base.steps=10", "--data.frames=2"])
    components = build(config)
    trainer = base.BaseTrainer(
        components, base.VideoPool.render(config, components, 4, 1), "base", base.BaseArguments()
    )
    assert trainer.lr(10) < trainer.lr(9) and trainer.lr(1) == trainer.stage.lr / trainer.stage.warmup
    before = {name: p.detach().clone() for name, p in trainer.trained.items()}
    trainer.backward()
    trainer.update(1)
    changed = [name for name, p in trainer.trained.items() if not torch.equal(p, before[name])]
    assert changed and trainer.loss.item() > 0
    decay = trainer.ema.decay_at(1)
    for name in changed:
        average = decay * before[name] + (1 - decay) * trainer.trained[name]
        torch.testing.assert_close(trainer.averages()[name], average)


def test_fewer_frames_are_for_run_py() -> None:
    config = parse(["--config", CONFIG, "--stages.base.frames=2", "--data.frames=3"])
    components = build(config)
    with pytest.raises(ValueError, match=r"stages\.base\.frames is 2; here it must be 0"):
        base.BaseTrainer(
            components, base.VideoPool.render(config, components, 2, 1), "base", base.BaseArguments()
        )


@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(backbone: str) -> None:
    """With Muon a matrix moves by one root mean square in all its directions; what AdamW moves is as without it."""
    flags = (f"--backbone={backbone}", "--train.batch-size=2", "--stages.base.warmup=0", "--data.frames=2")
    flags += ("--dit.conv", "True")
    config = parse(["--config", CONFIG, *flags])
    moves = {}
    for muon in (0.0, 2.0):
        torch.manual_seed(0)
        components = build(config)
        trainer = base.BaseTrainer(
            components, base.VideoPool.render(config, components, 4, 1), "base", base.BaseArguments(muon=muon)
        )
        before = {name: p.detach().clone() for name, p in trainer.trained.items()}
        torch.manual_seed(1)
        trainer.backward()
        trainer.update(1)
        moves[muon] = {name: p.detach() - before[name] for name, p in trainer.trained.items()}
    depthwise = {f"backbone.blocks.{i}.conv.weight" for i in range(5)}
    matrices = {n for n, move in moves[2.0].items() if "block" in n and move.ndim > 1} - depthwise
    assert 0 < len(matrices) < len(moves[2.0])
    assert {moves[2.0][n].ndim for n in matrices} == ({2} if backbone == "dit" else {2, 4})
    for name, move in moves[2.0].items():
        if name not in matrices:
            assert torch.equal(move, moves[0.0][name])
        elif move.any():  # 0.2 of AdamW's unit step, twice its learning rate
            matrix = move.flatten(1)
            spectrum = torch.linalg.svdvals(matrix)
            assert spectrum.max() < 2 * spectrum.median()
            size = 0.2 * max(matrix.shape) ** 0.5 * 2 * trainer.lr(1)
            assert 0.5 * size < spectrum.median() < 1.5 * size


def test_muon_without_a_matrix_is_refused() -> None:
    config = parse(["--config", CONFIG, "--stages.base.train", "backbone.x_embedder.*"])
    components = build(config)
    with pytest.raises(ValueError, match=r"muon is 3, but no matrix of a block is trained; use 0"):
        base.BaseTrainer(
            components, base.VideoPool.render(config, components, 2, 1), "base", base.BaseArguments(muon=3)
        )


def test_a_slow_start_does_not_cut_a_stage_that_is_run_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of steps follows the pace of the last ones, up to the stage's."""
    config = parse(["--config", CONFIG, "--train.batch-size=1", "--stages.base.steps=40", "--data.frames=2"])
    components = build(config)
    clock = 0.0

    class Slow(base.BaseTrainer):
        def backward(self) -> None:
            nonlocal clock
            clock += 1.0 if clock < 10 else 0.1  # seconds a step
            self.loss += 1

        def update(self, step: int) -> None: ...

    monkeypatch.setattr(base, "LOG_EVERY", 10)
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock)
    pool = base.VideoPool.render(config, components, 2, 1)
    for seconds, steps in ((15.0, 40), (12.0, 30)):
        clock, trainer = 0.0, Slow(components, pool, "base", base.BaseArguments())
        assert list(trainer.run("base", seconds))[-1]["step"] == steps == trainer.stage.steps


def test_only_the_toy_world_is_rendered(tmp_path: Path) -> None:
    settings = base.BaseArguments(
        out=str(tmp_path), set=("data.kind=triplets", f"data.triplets.root={tmp_path}")
    )
    with pytest.raises((ValueError, AssertionError)):
        base.main(settings)
