"""The steps that a budget buys, and the smallest budget that buys one step of each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dit_booth.comparison.budget import flops_text
from dit_booth.comparison.subjects import Subject
from dit_booth.comparison.systems import System, SystemCost
from dit_booth.config import RunConfig, StageName
from dit_booth.training.stage import stage_config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a system does with the budget: `steps` by stage, and its FLOPs.

    shared_flops: of training before any subject; subject_flops: for one subject, its share of the former included.
    """

    system: System
    cost: SystemCost
    steps: Mapping[StageName, int]
    shared_flops: float
    subject_flops: float


def make_plan(system: System, cost: SystemCost, budget: float, *, videos: int, amortise: int) -> Plan:
    """Return the steps that `budget` FLOPs per subject buy beside the sampling of `videos` videos and class images.

    A system that is trained once has the rest of `amortise` subjects' budgets for its stages, in their proportions.
    ValueError: the budget is too small for one step of a stage; it names the system and the smallest budget.
    """
    fixed = videos * cost.video + cost.prior
    share = amortise if system.kind == "encoder" else 1
    recipe = {name: stage_config(system.config, name).steps for name in cost.steps}
    whole = _training(cost, recipe)
    least = fixed + (whole / min(recipe.values()) / share if recipe else 0.0)  # a step of the shortest stage
    if budget < least:
        raise ValueError(
            f"--budget is {flops_text(budget)} per subject, too small for {system.name}, which needs"
            f" {flops_text(least)} ({_purpose(cost, videos)}); raise it, or leave the system out of --methods"
        )
    scale = (budget - fixed) * share / whole if recipe else 0.0
    steps = {
        name: math.floor(count * scale * (1 + 1e-12)) for name, count in recipe.items()
    }  # 1 - 1e-16 is 1
    trained = _training(cost, steps)
    return Plan(
        system=system,
        cost=cost,
        steps=steps,
        shared_flops=trained if system.kind == "encoder" else 0.0,
        subject_flops=fixed + trained / share,
    )


def _training(cost: SystemCost, steps: Mapping[StageName, int]) -> float:
    return sum(cost.steps[name] * count for name, count in steps.items())


def _purpose(cost: SystemCost, videos: int) -> str:
    parts = [f"{videos} video{'s' if videos > 1 else ''}"]
    parts += ["class images"] if cost.prior else []
    parts += [f"a step of {' and '.join(cost.steps)}"] if cost.steps else []
    return ", ".join(parts)


def shared_config(plan: Plan, seed: int, folder: Path, out: Path) -> RunConfig:
    """Return the run that trains a system's stages; `folder`: of the comparison, `out`: of the run's own files."""
    config = plan.system.config
    stages: dict[str, Any] = {
        name: replace(old, steps=count, warmup=min(old.warmup, count // 10))
        for name, count in plan.steps.items()
        for old in (stage_config(config, name),)
    }
    last: StageName | Literal[""] = list(plan.steps)[-1] if plan.steps else ""
    return replace(
        config,
        stages=replace(config.stages, **stages),
        train=replace(config.train, seed=seed),
        store=str(folder / "stages"),
        out=str(out),
        stop_after=last,  # the stages' weights are in the store: no second copy
    )


def subject_config(shared: RunConfig, subject: Subject) -> RunConfig:
    """Return the run that is optimized for one subject."""
    return replace(shared, subject=subject.settings(shared.subject))
