"""What is there of a sweep: states of its points and stages, and ``sweep.jsonl``, a row for each point.

The rows are a pure function of the points' own files, so that they may be written at any time, by any process. All but
the measured times and memory are the same for a sweep that was killed and continued and one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dit_booth.cost.totals import training_costs
from dit_booth.files import Lock, read_lines, write_text
from dit_booth.study.plan import Plan, Point, StageRef

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
"""Every cost of a row: those of its run, and those of its stages and its launcher."""
MEASURED = (*COSTS[2:], "train_seconds", "launch_seconds", "seconds")
"""Fields that differ from one running of the same sweep to the next."""


def is_finished(folder: Path) -> bool:
    """Whether a run ended well: by its marker, never by how its launcher ended."""
    return (folder / "finished").is_file()


def stage_finished(plan: Plan, stage: StageRef) -> bool:
    return not stage.steps or (plan.stage_folder(stage) / "weights.safetensors").is_file()


def missing_stages(plan: Plan, point: Point) -> Iterator[StageRef]:
    """The stages of a point that are not trained yet, in order."""
    return (stage for stage in point.stages if not stage_finished(plan, stage))


def steps_done(plan: Plan, stage: StageRef) -> int:
    """The steps that need not be made again: all, or those of the last checkpoint."""
    if stage_finished(plan, stage):
        return stage.steps
    latest = read_json(plan.stage_folder(stage) / "latest.json")
    return int(str(latest.get("tag", "step0")).removeprefix("step"))


def in_use(folder: Path) -> bool:
    """Whether a living process holds a run's or a stage's folder."""
    return Lock(folder).held()


def status_of(plan: Plan, point: Point) -> Status:
    folder = plan.run_folder(point)
    if is_finished(folder):
        return "finished"
    return "failed" if (folder / FAILED).is_file() else "waiting"


def write_rows(plan: Plan) -> list[dict[str, Any]]:
    """Write ``sweep.jsonl``, unless it says the same already; the rows."""
    uses = plan.uses()
    rows = [row_of(plan, point, {key for key, count in uses.items() if count > 1}) for point in plan.points]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file = plan.folder / ROWS
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)
    return rows


def row_of(plan: Plan, point: Point, shared: set[str]) -> dict[str, Any]:
    """A point's row; `shared`: keys of the stages that other points have too."""
    folder, status = plan.run_folder(point), status_of(plan, point)
    cost = read_json(folder / "cost.json") if status == "finished" else {}
    stages = {stage["address"]: stage for stage in cost.get("stages", [])}
    trained = [stages.get(stage.address, {}) for stage in point.stages if stage.steps]
    launch = read_json(folder / LAUNCH)
    return {
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


def _metrics(folder: Path) -> dict[str, Any]:
    """The scores that a run ended with: mean over prompts, standard error, number of prompts."""
    last: dict[str, Any] = {}
    for line in read_lines(folder / "metrics.jsonl"):
        last = line.get("samples", last)
    return {
        name: {k: None if v != v else v for k, v in score.items()} for name, score in last.items()
    }  # no NaN


def read_json(file: Path) -> dict[str, Any]:
    """An object that was written whole; empty where there is none."""
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return content
