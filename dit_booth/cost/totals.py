"""Cost of a run's training, from the ``cost.json`` of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def training_costs(stages: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Sum seconds and FLOPs of all training steps of a point over its stages; None where one of them is unknown.

    A shared stage counts in full in every point that has it, whichever point happened to train it.
    """
    seconds = [stage.get("seconds") for stage in stages]
    flops = [
        stage["flops_per_step"] * stage["steps"] if {"flops_per_step", "steps"} <= stage.keys() else None
        for stage in stages
    ]
    return {"train_seconds": _total(seconds), "train_flops": _total(flops)}


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
