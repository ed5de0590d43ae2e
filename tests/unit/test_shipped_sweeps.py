"""The sweeps in ``experiments/sweeps``: each can be planned, at nano size and at full size, and shares what it can."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from dit_booth.components import build
from dit_booth.config.parse import parse, to_argv
from dit_booth.cost import describe
from dit_booth.strategy import names_in
from dit_booth.study.description import read_description
from dit_booth.study.estimate import config_of, flops_of_step, latents_of
from dit_booth.study.plan import SweepPlan, expand
from dit_booth.training.address import stages_of
from dit_booth.training.stage import schedule_of, set_trainable, stage_config, trainable_globs
from dit_booth.training.stage_cost import count_flops

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "sweeps"
NAMES = {
    "schedule": (4, 1),
    "query_projection": (4, 1),
    "token_bank": (5, 1),
    "strategies": (9, 0),
    "anchoring": (9, 0),
    "reference_noise": (4, 1),
    "backbones": (2, 0),
    "engine": (6, 0),
}
"""Points of a seed, and how many stages several of them share."""


@cache
def planned(file: Path, override: Path | None = None) -> SweepPlan:
    """The plan of the first seed."""
    d = read_description(file, override)
    assert override or d.seeds == (0, 1)
    d = replace(d, seeds=(0,))
    return SweepPlan(
        name=d.name, folder=Path(), store=Path(), launcher=d.launcher, ranks=d.ranks, points=tuple(expand(d))
    )


def test_all_are_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == {*NAMES, "full"}


@pytest.mark.parametrize("name", NAMES)
def test_a_nano_sweep(name: str) -> None:
    plan = planned(FOLDER / f"{name}.yaml")
    count, shared = NAMES[name]
    assert (len(plan.points), plan.ranks) == (count, 1)
    assert sum(uses > 1 for uses in plan.uses().values()) == shared
    assert sum(point.baseline for point in plan.points) == 1
    assert {point.settings["data"]["kind"] for point in plan.points} == {"toyworld"}
    groups = {point.group for point in plan.points}
    assert len(groups) == count


@pytest.mark.parametrize("name", NAMES)
def test_each_declares_its_primary_question(name: str, full: Path) -> None:
    nano, large = (read_description(FOLDER / f"{name}.yaml", over) for over in (None, full))
    assert nano.primary and nano.primary.metric == "appearance"
    assert large.primary and large.primary.metric == "dino_i"  # the toy world's metrics need its renderer
    assert (name == "engine") == (nano.primary.margin is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_nano_point_of_every_variant_can_be_built_and_trained(name: str) -> None:
    """As its run does it, up to the gradients of a video in its last stage: what planning alone cannot know.

    With two blocks of the DiT's five, which suffice for every layout. Engines take no part in it: one point stands for
    all that differ in theirs.
    """
    points = planned(FOLDER / f"{name}.yaml").points
    for point in {str({**p.settings, "ds_config": "", "out": ""}): p for p in points}.values():
        config = config_of(
            {**point.settings, "weights": "none", "dit": {**point.settings["dit"], "depth": 2}}
        )
        components, data = build(config), config.data.build()
        for of in stages_of(config):
            stage, components.model.active = stage_config(config, of.name), of.active
            set_trainable(
                components.model, trainable_globs(config, components.model, of.name, of.active), of.active
            )
        if point.stages:
            assert count_flops(components, stage, data, torch.float32, torch.device("cpu")) > 0, point.label


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``full.yaml`` with the three paths given."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "data").mkdir()
    (folder / "data" / "train.csv").write_text("videoid,page_dir,name\n")
    for name in ("unet.pt", "global_mapper.pt"):
        (folder / name).write_text(name)
    text = (FOLDER / "full.yaml").read_text().replace("path/to", str(folder))
    file = folder / "full.yaml"
    file.write_text(text.replace("../configs", str(ROOT / "experiments" / "configs")))
    return file


@pytest.mark.parametrize("name", NAMES)
def test_the_same_at_full_size_by_one_file(name: str, full: Path) -> None:
    plan = planned(FOLDER / f"{name}.yaml", full)
    count, shared = NAMES[name]
    assert (plan.name, plan.ranks, len(plan.points)) == (f"{name}-full", 8, count)
    assert sum(uses > 1 for uses in plan.uses().values()) == shared
    for point in plan.points:
        assert (point.settings["data"]["kind"], point.settings["data"]["size"]) == ("triplets", 256)
        assert all(stage.steps >= 30000 for stage in point.stages)
    if name in ("schedule", "strategies"):
        nano = {point.label for point in planned(FOLDER / f"{name}.yaml").points}
        assert {point.label for point in plan.points} == nano


@pytest.mark.parametrize(("backbone", "size"), [("unet", 0.9e9), ("dit", 0.7e9)])
def test_every_strategy_s_full_size_network_can_be_built(backbone: str, size: float, full: Path) -> None:
    """On the meta device, with what each stage trains: nearly a billion parameters cost nothing there."""
    for point in planned(FOLDER / "strategies.yaml", full).points:
        other = {"backbone": backbone, "dit": {**point.settings["dit"], "size": "XL"}}
        config = config_of({**point.settings, **other})
        root = describe.build(config, latents_of(config))
        assert sum(p.numel() for p in root.backbone.parameters()) > size
        for of in stages_of(config):
            trained = set_trainable(root, trainable_globs(config, root, of.name, of.active), of.active)
            assert all(p.is_meta for p in trained.values()) and trained, point.label


def test_a_full_size_step_costs_teraflops(full: Path) -> None:
    (point,) = (p for p in planned(FOLDER / "strategies.yaml", full).points if p.label == "K/V concat")
    config = config_of({**point.settings, "train": {**point.settings["train"], "batch_size": 1}})
    (stage,) = stages_of(config)
    forward_backbone = (
        3.15e12  # for 16 frames (full.yaml); the backward pass is more, the image's pass a frame more
    )
    assert 2 * forward_backbone < flops_of_step(config, stage) < 4 * forward_backbone


@pytest.mark.parametrize("name", NAMES)
def test_a_mapper_is_given_to_the_points_that_have_one(name: str, full: Path) -> None:
    """A run whose strategies take nothing from its `strategy_weights` is an error, but only once it is built."""
    for plan in (planned(FOLDER / f"{name}.yaml"), planned(FOLDER / f"{name}.yaml", full)):
        for point in plan.points:
            has_one = "token_replacement" in names_in(point.settings["strategy"])
            given = bool(point.settings["strategy_weights"])
            assert given == (has_one and plan.ranks == 8), point.label


def test_without_the_paths_the_full_size_says_what_lacks() -> None:
    with pytest.raises(
        ValueError, match=r"'path/to/unet\.pt', which is neither a file nor a folder|path/to/data"
    ):
        planned(FOLDER / "schedule.yaml", FOLDER / "full.yaml")


def test_the_backbones_cost_the_same() -> None:
    """FLOPs of a step that trains the whole backbone, for one video."""
    flops = {}
    for point in planned(FOLDER / "backbones.yaml").points:
        settings = point.settings
        flags = {"weights": "none", "schedule": ["base"], "backbone": settings["backbone"]}
        flags |= {f"dit.{name}": settings["dit"][name] for name in ("size", "plan", "conv")}
        flags |= {"unet.channels": settings["unet"]["channels"]}
        base = str(ROOT / "experiments/configs/toyworld_base.yaml")
        config = parse(["--config", base, *to_argv(flags)])
        components = build(config)
        components.model.active = ()
        set_trainable(components.model, ["backbone.*"])
        data, device = config.data.build(), torch.device("cpu")
        flops[point.label] = count_flops(components, config.stages.base, data, torch.float32, device)
    assert len(flops) == 2
    assert max(flops.values()) / min(flops.values()) < 1.05, flops


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("two_stage", ("coarse", "fine")),
        ("coarse_only", ("coarse",)),
        ("fine_only", ("fine",)),
        ("joint", ("joint",)),
    ],
)
def test_schedules_are_configurations(name: str, schedule: tuple[str, ...]) -> None:
    """Table 2's rows: all but the coarse stage alone see the same number of steps."""
    config = parse(["--config", str(ROOT / f"experiments/configs/schedules/{name}.yaml")])
    assert schedule_of(config) == schedule
    steps = sum(stage.steps for stage in stages_of(config))
    assert steps == (400 if name == "coarse_only" else 700)
