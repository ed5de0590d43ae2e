"""All of a comparison in order: subjects, budget, plans, work, results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from dit_booth.comparison.budget import Budget, flops_text, keep, parse_budget, resolve
from dit_booth.comparison.plan import Plan, make_plan
from dit_booth.comparison.results import write_results
from dit_booth.comparison.subjects import Subject, read_subjects
from dit_booth.comparison.systems import BASELINE, System, SystemCost, base_throughput, cost_of, find_systems
from dit_booth.comparison.work import Point, work
from dit_booth.config import RunConfig, SampleReference
from dit_booth.errors import SEED, check_ranges
from dit_booth.files import write_text
from dit_booth.training.address import digest
from dit_booth.training.distributed import Ranks, owning, start, stop

log = logging.getLogger("dit_booth")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare: the budget (`parse_budget`), the systems by name (none: all), and on how many subjects."""

    budget: str
    split: Literal["dev", "test"]
    subjects: int
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    noise_seeds: tuple[int, ...]
    amortise: int
    folder: Path
    settings: Mapping[str, object]
    command: str

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "",
            **dict.fromkeys(("subjects", "amortise"), "[1, 1000000]"),
            **dict.fromkeys(("seeds", "noise_seeds"), SEED),
        )
        for name in ("seeds", "noise_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}; name at least one, each once")
        parse_budget(self.budget)


def compare(comparison: Comparison) -> list[Point]:
    """Do what is left of a comparison; return its points. The same call resumes it, or shares its work.

    Several processes may run at once: each takes the subjects that no other has.

    ValueError: settings that cannot work, before anything is trained. KeyboardInterrupt: stopped, resumable.
    """
    systems = find_systems(comparison.methods, comparison.settings)
    ranks = start()
    try:
        if ranks.world > 1:
            raise ValueError(
                f"a comparison runs in one process, and there are {ranks.world} ranks; start one"
            )
        with owning(comparison.folder, ranks):
            points, about = _prepare(comparison, systems, ranks)
        for point in points:
            work(point, ranks)
            with owning(comparison.folder, ranks):
                write_results(comparison.folder, points, comparison.amortise, about, comparison.command)
        return points
    finally:
        stop()


def _prepare(comparison: Comparison, systems: Sequence[System], ranks: Ranks) -> tuple[list[Point], str]:
    """Return the points, and the text about them; the folder gets the subjects' files, the budget, and all costs."""
    folder, base = comparison.folder, RunConfig.create("none", **comparison.settings)
    files = folder / "subjects" / digest([asdict(base.data), comparison.split], 8)
    subjects = read_subjects(base.data, comparison.split, comparison.subjects, files)
    for system, subject in product(systems, subjects):  # an error of any subject comes before all training
        if system.kind == "subject":
            subject.settings(system.config.subject)
    budget = resolve(comparison.budget, folder, lambda: base_throughput(base, ranks))
    costs = [_cost(system, subjects[0], folder, ranks) for system in systems]
    plans = [
        make_plan(
            system,
            cost,
            budget.flops,
            videos=len(comparison.noise_seeds),
            amortise=comparison.amortise,
        )
        for system, cost in zip(systems, costs, strict=True)
    ]
    keep(budget, folder)
    for plan in plans:
        steps = ", ".join(f"{name} {count} steps" for name, count in plan.steps.items()) or "no training"
        log.info("%-22s%s, %s per subject", plan.system.name, steps, flops_text(plan.subject_flops))
    sample = replace(base.sample, split=comparison.split, seeds=comparison.noise_seeds, references=("own",))
    points = [
        Point(
            plan=plan,
            seed=seed,
            folder=folder,
            subjects=tuple(subjects),
            sample=sample,
            controls=_controls(plan, len(subjects)),
        )
        for plan in plans
        for seed in comparison.seeds
    ]
    return points, _about(comparison, budget)


def _cost(system: System, subject: Subject, folder: Path, ranks: Ranks) -> SystemCost:
    """Return a system's cost, from the folder if it was counted before: a resumed comparison starts at once."""
    file = folder / "costs" / f"{system.name}-{digest(system.config.as_dict())}.json"
    if file.is_file():
        return SystemCost(**json.loads(file.read_text()))
    cost = cost_of(system, subject, ranks)
    write_text(file, json.dumps(asdict(cost), indent=1) + "\n")
    return cost


def _controls(plan: Plan, subjects: int) -> tuple[SampleReference, ...]:
    """Return the floors of a system: those of the baseline alone."""
    if plan.system.name != BASELINE:
        return ()
    return ("shuffled", "none") if subjects > 1 else ("none",)


def _about(comparison: Comparison, budget: Budget) -> str:
    measured = (
        f", which is {comparison.budget} at {flops_text(budget.throughput)} per second"
        if budget.throughput
        else ""
    )
    return (
        f"Systems at one budget: {flops_text(budget.flops)} for each of {comparison.subjects} subjects{measured}."
        " It pays for class images, training and sampling. Systems without per-subject optimization train once, for"
        f" {comparison.amortise} subjects' budgets; FLOPs and time per subject include that share. Floors are not paid."
    )
