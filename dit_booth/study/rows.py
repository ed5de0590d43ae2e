"""State of a sweep's points and stages, and ``sweep.jsonl``, one row per point.

The rows are a pure function of the points' own files, so any process may write them at any moment. All but the measured
seconds and memory are the same whether or not the sweep was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from dit_booth.cost.totals import training_costs
from dit_booth.files import Lock, read_lines, write_text
from dit_booth.study.plan import Point, StageRef, SweepPlan

JsonObject = dict[str, Any]
Status = Literal["finished", "failed", "waiting"]
ROWS = "sweep.jsonl"
FAILED = "failed.json"
LAUNCH = "launch.json"
COSTS = (
    "trained_parameters",
    "flops_per_step",
    "step_seconds",
    "peak_memory_mib",
    "sample_seconds",
    "wall_seconds",
)
ALL_COSTS = (*COSTS, "train_seconds", "train_flops", "launch_seconds")
"""All costs of a row: those of its run, its stages and its launcher."""
MEASURED = (*COSTS[2:], "train_seconds", "launch_seconds", "seconds")
"""Fields that differ each time the same sweep runs."""


class ScoreSummary(TypedDict):
    """A metric over a point's prompts; None where a value is NaN."""

    mean: float | None
    stderr: float | None
    n: int


class StageRow(TypedDict):
    """A stage in a row; `shared`: other points have it, too."""

    name: str
    address: str
    steps: int
    shared: bool
    seconds: float | None
    step_seconds: float | None


class SweepRow(TypedDict):
    """A row of ``sweep.jsonl`` (docs/sweeps.md)."""

    point: str
    label: str
    group: str
    seed: int
    baseline: bool
    options: dict[str, object]
    status: Status
    error: list[str]
    run: str
    metrics: dict[str, ScoreSummary]
    stages: list[StageRow]
    trained_parameters: int | None
    flops_per_step: float | None
    step_seconds: float | None
    peak_memory_mib: float | None
    sample_seconds: float | None
    wall_seconds: float | None
    train_seconds: float | None
    train_flops: float | None
    launch_seconds: float | None


def is_finished(folder: Path) -> bool:
    """Return whether a run has written its marker; its launcher's exit code says nothing."""
    return (folder / "finished").is_file()


def stage_finished(plan: SweepPlan, stage: StageRef) -> bool:
    return not stage.steps or (plan.stage_folder(stage) / "weights.safetensors").is_file()


def missing_stages(plan: SweepPlan, point: Point) -> Iterator[StageRef]:
    """Iterate over the stages of a point that are not trained yet, in order."""
    return (stage for stage in point.stages if not stage_finished(plan, stage))


def steps_done(plan: SweepPlan, stage: StageRef) -> int:
    """Return the steps that need no repetition: all, or those of the last checkpoint."""
    if stage_finished(plan, stage):
        return stage.steps
    latest = read_json(plan.stage_folder(stage) / "latest.json")
    return int(str(latest.get("tag", "step0")).removeprefix("step"))


def in_use(folder: Path) -> bool:
    """Return whether a living process holds the lock of a run's or a stage's folder."""
    return Lock(folder).held()


def status_of(plan: SweepPlan, point: Point) -> Status:
    folder = plan.run_folder(point)
    if is_finished(folder):
        return "finished"
    return "failed" if (folder / FAILED).is_file() else "waiting"


def write_rows(plan: SweepPlan) -> list[SweepRow]:
    """Write ``sweep.jsonl`` unless it is up to date. Returns the rows."""
    uses = plan.uses()
    rows = [row_of(plan, point, {key for key, count in uses.items() if count > 1}) for point in plan.points]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = plan.folder / ROWS
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)
    return rows


def row_of(plan: SweepPlan, point: Point, shared: set[str]) -> SweepRow:
    """Return a point's row; `shared`: keys of the stages that other points have, too."""
    folder, status = plan.run_folder(point), status_of(plan, point)
    cost = read_json(folder / "cost.json") if status == "finished" else {}
    stages = {stage["address"]: stage for stage in cost.get("stages", [])}
    trained = [stages.get(stage.address, {}) for stage in point.stages if stage.steps]
    launch = read_json(folder / LAUNCH)
    row = {
        "point": point.id,
        "label": point.label,
        "group": point.group,
        "seed": point.seed,
        "baseline": point.baseline,
        "options": point.options,
        "status": status,
        "error": read_json(folder / FAILED).get("error", []) if status == "failed" else [],
        "run": f"points/{point.id}",
        "metrics": _metrics(folder) if status == "finished" else {},
        "stages": [
            {
                "name": stage.name,
                "address": stage.address,
                "steps": stage.steps,
                "shared": stage.key in shared,
                **{k: stages.get(stage.address, {}).get(k) for k in ("seconds", "step_seconds")},
            }
            for stage in point.stages
        ],
        **{name: cost.get(name) for name in COSTS},
        **(training_costs(trained) if status == "finished" else dict.fromkeys(training_costs([]))),
        "launch_seconds": launch.get("launch_seconds") if status == "finished" else None,
    }
    return cast(SweepRow, row)


def _metrics(folder: Path) -> dict[str, ScoreSummary]:
    """Return the scores at the end of a run's log, with None for NaN."""
    last: JsonObject = {}
    for line in read_lines(folder / "metrics.jsonl"):
        last = line.get("samples", last)
    return {
        name: cast(ScoreSummary, {k: None if v != v else v for k, v in score.items()})
        for name, score in last.items()
    }


def read_json(file: Path) -> JsonObject:
    """Return the JSON object in a file; empty if there is no such file."""
    content: JsonObject = json.loads(file.read_text()) if file.is_file() else {}
    return content
