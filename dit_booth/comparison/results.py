"""The finished subjects of a comparison as a sweep's folder: its points, ``sweep.jsonl`` and ``sweep.yaml``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dit_booth.comparison.work import Point, Record
from dit_booth.evaluation.folder import VideoRow, write_rows
from dit_booth.evaluation.scores import SCORES, read_scores, write_scores
from dit_booth.files import write_text
from dit_booth.study.rows import ROWS
from dit_booth.training.stage_cost import COST

BASELINE = "videobooth"
"""The system that all are compared with, where it takes part."""


def write_results(
    folder: Path,
    points: Sequence[Point],
    amortise: int,
    about: str,
    command: str,
) -> None:
    """Write all points whose subjects are all done, and the files from which the report reads the comparison."""
    rows = [write_point(point, amortise) for point in points]
    described: dict[str, Any] = {"name": folder.resolve().name, "about": about, "command": command}
    names = {point.plan.system.name for point in points}
    if BASELINE in names and len(names) > 1:
        described["primary"] = {"metric": "appearance", "contrasts": "baseline"}
    write_text(folder / "sweep.yaml", yaml.safe_dump(described, sort_keys=False, width=110))
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))


def write_point(point: Point, amortise: int) -> dict[str, Any]:
    """Write a point's files; return its row of ``sweep.jsonl``: finished if all subjects are."""
    records = [point.record(subject) for subject in point.subjects]
    done = [record for record in records if record is not None]
    finished = len(done) == len(records)
    name = point.plan.system.name
    costs = costs_of(point, done, amortise) if finished else {}
    if finished:
        write_samples(point, done)
        first = replace(point.config_for(point.subjects[0]), stop_after="")  # repeats the first subject's run
        settings = first.as_dict()
        write_text(point.place / "run.yaml", yaml.safe_dump(settings, sort_keys=False))
        write_text(point.place / COST, json.dumps(costs, indent=1) + "\n")
    return {
        "point": point.id,
        "label": name,
        "group": name,
        "seed": point.seed,
        "baseline": name == BASELINE,
        "options": {"method": name},
        "status": "finished" if finished else "waiting",
        "error": [],
        "run": f"points/{point.id}",
        "stages": [],
        "train_seconds": None,  # per subject: subject_seconds
        "train_flops": None,
        **costs,
    }


def write_samples(point: Point, records: Sequence[Record]) -> None:
    """Write ``videos.csv`` and ``scores.jsonl`` of a point, from those of its subjects."""
    samples = point.place / "samples"
    write_rows(samples, [VideoRow(**row) for record in records for row in record["rows"]])
    write_scores(
        samples / SCORES,
        [score for subject in point.subjects for score in read_scores(point.scores(subject))],
    )


def costs_of(point: Point, records: Sequence[Record], amortise: int) -> dict[str, float]:
    """Return the costs of a point: for one subject on average, and before any subject."""
    plan, encoder = point.plan, point.plan.system.kind == "encoder"
    share = amortise if encoder else 1
    seconds = [record["sample_seconds"] + record["train_seconds"] / share for record in records]
    return {
        "trained_parameters": plan.cost.trained_parameters,
        "tuning_free": float(plan.system.kind != "subject"),
        "subject_flops": plan.subject_flops,
        "subject_seconds": statistics.mean(seconds),
        "subject_bytes": statistics.mean(record["bytes"] for record in records),
        "shared_flops": plan.shared_flops,
    }
