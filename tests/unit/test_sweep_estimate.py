"""The cost that a sweep's dry run tells before anything was measured, and what it rests on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.cost.describe import Encoders
from dit_booth.models.clip.config import ClipConfig
from dit_booth.study import estimate
from dit_booth.study.description import read_description
from dit_booth.study.plan import SweepPlan, plan_sweep
from dit_booth.study.show import show_plan
from dit_booth.training.address import stages_of
from dit_booth.training.stage import set_trainable, stage_config, trainable_globs
from dit_booth.training.stage_cost import count_flops

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "experiments/configs/demo.yaml")


@pytest.mark.parametrize(
    ("strategy", "backbone"),
    [
        ("token_replacement+kv_concat", "dit"),
        ("adaln", "dit"),
        ("token_bank", "dit"),
        ("in_context", "dit"),
        ("spatial_concat", "dit"),
        ("token_replacement+kv_concat", "unet"),
        ("spatial_concat", "unet"),
    ],
)
def test_the_flops_are_those_that_the_run_counts(strategy: str, backbone: str) -> None:
    """Up to the text tower, which only the run counts: a few per cent of these tiny networks.

    Every kind of tap on the DiT; on the U-Net a recording pass, and a picture below every frame.
    """
    config = parse(["--config", DEMO, "--strategy", strategy, "--backbone", backbone])
    components, data = build(config), config.data.build()
    for of in stages_of(config):
        stage, components.model.active = stage_config(config, of.name), of.active
        set_trainable(
            components.model, trainable_globs(config, components.model, of.name, of.active), of.active
        )
        counted = (
            count_flops(components, stage, data, torch.float32, torch.device("cpu")) * config.train.batch_size
        )
        assert estimate.flops_of_step(config, of) == pytest.approx(counted, rel=0.1), of.name


def test_a_stage_that_trains_the_text_tower() -> None:
    """That is a stub, without parameters, but its gradient goes through the backbone."""
    flags = ["--weights", "none", "--schedule", "base", "--stages.base.train"]
    config = parse(["--config", DEMO, *flags, "text.*"])
    both = parse(["--config", DEMO, *flags, "text.*", "backbone.*"])
    alone, whole = (estimate.flops_of_step(c, stages_of(c)[0]) for c in (config, both))
    assert 0.6 * whole < alone < 0.75 * whole, "without the gradients of the weights, a third"


def test_encoders_have_their_model_s_sizes() -> None:
    assert Encoders.of(ClipConfig(model="ViT-L-14-quickgelu")) == Encoders()
    tiny = Encoders(text=128, tokens=24, image=96, patches=65, common=128)
    assert Encoders.of(ClipConfig(model="dit-booth-tiny")) == tiny


def planned(folder: Path, **changes: Any) -> SweepPlan:
    options = {"stages.coarse.steps": 40, "stages.fine.steps": 20, "dit.depth": 1, "weights": "none"}
    description = {
        "base": DEMO,
        "options": options,
        "grid": {"kv_concat.update": ["first_frame_value", "direct"]},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**description, **changes}))
    return plan_sweep(read_description(file), folder / "sweep", folder / "sweep" / "stages")


def seconds_of(said: str) -> float:
    found = re.search(r"estimate: about (?:(\d+) h )?(\d+) min(?: (\d+) s)? of training", said)
    assert found, said
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + seconds


def test_a_new_sweep_is_estimated_from_its_flops_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "matmul_rate", lambda device: 1e10)  # a machine of known speed
    plan = planned(tmp_path, seeds=[0, 1])
    said = show_plan(plan)
    flags = ["--config", DEMO, "--dit.depth", "1", "--weights", "none"]
    config = parse(flags)
    coarse, fine = (estimate.flops_of_step(config, of) for of in stages_of(config))
    other = parse([*flags, "--kv-concat.update", "direct"])
    direct = estimate.flops_of_step(other, stages_of(other)[1])
    work = 2 * (40 * coarse + 20 * (fine + direct))
    assert seconds_of(said) == pytest.approx(work / (estimate.REACHED * 1e10), abs=1)
    assert f"160 steps by their FLOPs ({work:.3g}, counted without encoders)" in said
    assert "assumed: 40% of the 0.01 TFLOP/s of matrix products on this machine's CPU" in said


def test_what_was_measured_is_used_first(tmp_path: Path) -> None:
    plan = planned(tmp_path, seeds=[0])
    coarse, fine = plan.points[0].stages

    def finish(stage: Any, **cost: float) -> None:
        folder = plan.stage_folder(stage)
        folder.mkdir(parents=True)
        (folder / "cost.json").write_text(json.dumps(cost))
        (folder / "weights.safetensors").write_text("")

    finish(coarse, step_seconds=2.0, flops_per_step=1e11)
    said = show_plan(plan)
    flops = sum(estimate.flops_of_steps(plan, [point.stages[1].key for point in plan.points]).values())
    assert seconds_of(said) == pytest.approx(20 * flops / 0.5e11, abs=1), "at the coarse stage's rate"
    assert "TFLOP/s, the median rate of the finished stages (1)" in said
    finish(fine, step_seconds=3.0, flops_per_step=1e9)
    said = show_plan(plan)
    assert seconds_of(said) == 60 and "20 steps by step times of finished stages" in said
    assert "FLOPs" not in said
    finish(plan.points[1].stages[1], step_seconds=3.0, flops_per_step=1e9)
    assert "estimate" not in show_plan(plan)


def test_ranks_are_gpus_and_share_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "matmul_rate", lambda device: 1e12)
    plan = replace(planned(tmp_path, seeds=[0]), ranks=8)
    assert estimate.rate_of(plan).flops == pytest.approx(0.4e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert estimate.rate_of(plan).flops == pytest.approx(8 * 0.4e12)


def test_the_rate_of_matrix_products_is_measured() -> None:
    assert 1e8 < estimate.matmul_rate(torch.device("cpu")) < 1e14
