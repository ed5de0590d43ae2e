"""Read a sweep's folder, or run folders, into the points of a report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dit_booth.cost.totals import training_costs
from dit_booth.evaluation.scores import SCORES
from dit_booth.report.read_samples import read_sample_folder
from dit_booth.report.study import (
    COSTS,
    PLACES,
    Group,
    PointResult,
    SampleFolder,
    StageResult,
    Study,
)
from dit_booth.study.description import flatten
from dit_booth.study.primary import read_primary

JsonObject = dict[str, Any]


def read_study(folders: Sequence[Path]) -> Study:
    """Read a sweep's folder, or one or more folders of runs or of scored videos (``dit-booth evaluate``).

    Raises:
        ValueError: a folder is neither, or a file in it is missing or malformed; the message names it.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give a sweep's folder, or run folders")
    if (folders[0] / "sweep.jsonl").is_file():
        if len(folders) > 1:
            raise ValueError(f"{folders[0]} is a sweep's folder; give it alone, or run folders only")
        return read_sweep(folders[0])
    for folder in folders:
        if not any((folder / name).is_file() for name in ("run.yaml", SCORES)):
            raise ValueError(
                f"{folder} has no sweep.jsonl, no run.yaml and no {SCORES}; give a sweep's folder, run folders, or"
                " folders of videos that dit-booth evaluate has scored"
            )
    return read_runs(folders)


def read_sweep(folder: Path) -> Study:
    """Read the points of ``sweep.jsonl``, in its order, with their run folders."""
    rows = list(read_lines(folder / "sweep.jsonl"))
    if not rows:
        raise ValueError(f"{folder / 'sweep.jsonl'} is empty; run the sweep: it writes a line for each point")
    points = [_sweep_point(folder, row, f"{folder / 'sweep.jsonl'}:{number}") for number, row in rows]
    file = folder / "sweep.yaml"
    text = file.read_text() if file.is_file() else ""
    described = read_yaml(file) if text else {}
    return Study(
        title=str(described.get("title") or described.get("name") or folder.resolve().name),
        about=str(described.get("about") or ""),
        folder=folder,
        groups=tuple(_groups(points)),
        commands=(
            str(described.get("command") or f"dit-booth sweep {shlex.quote(str(file))}"),
            f"dit-booth report {folder} --csv --latex",
        ),
        description=text,
        primary=read_primary(described.get("primary"), str(file)),
    )


def read_runs(folders: Sequence[Path]) -> Study:
    """Read folders of runs or of scored videos as points, one row each; the first one is the baseline."""
    files = [folder / "run.yaml" for folder in folders]
    settings = [flatten(read_yaml(file)) if file.is_file() else {} for file in files]
    names = dict.fromkeys(name for setting in settings for name in setting if name not in PLACES)
    differing = [n for n in names if len({repr(setting.get(n)) for setting in settings if setting}) > 1]
    points = [
        _run(folder, setting, differing, baseline=number == 0 and len(folders) > 1)
        for number, (folder, setting) in enumerate(zip(folders, settings, strict=True))
    ]
    return Study(
        title=points[0].label if len(points) == 1 else f"{len(points)} runs",
        sweep=False,
        folder=folders[0],
        groups=tuple(_groups(points)),
        commands=tuple(
            f"dit-booth run --config {file}" if file.is_file() else f"dit-booth evaluate {file.parent}"
            for file in files
        ),
    )


def _run(
    folder: Path, settings: dict[str, object], differing: Sequence[str], *, baseline: bool
) -> PointResult:
    """Read a run's folder, or a folder of scored videos, which has no settings."""
    scored = not settings
    finished, log = scored or (folder / "finished").is_file(), folder / "metrics.jsonl"
    stages = _run_log(log) if log.is_file() else ()
    costs = {"step_seconds": stages[-1].step_seconds} if stages else {}
    file = folder / "cost.json"
    if file.is_file():
        cost = read_json(file)
        costs = _costs({**cost, **training_costs(cost.get("stages") or [])}, str(file))
        stages = tuple(_stage(stage, str(file)) for stage in cost.get("stages") or ()) or stages
    place = folder.resolve()
    return PointResult(
        id=str(folder),
        label=place.parent.name if scored and place.name == "samples" else place.name,
        group=str(folder),
        folder=folder,
        status="finished" if finished else "unfinished",
        baseline=baseline,
        options={name: settings[name] for name in differing if name in settings},
        costs=costs,
        stages=stages,
        samples=read_sample_folder(folder if scored else folder / "samples") if finished else SampleFolder(),
        settings=settings,
    )


def stage_losses(study: Study, point: PointResult, stage: StageResult) -> list[tuple[int, float]]:
    """Return (step, loss) of a stage: from its folder in the sweep, else from the point's log."""
    own = study.folder / "stages" / f"{stage.name}-{stage.address}" / "metrics.jsonl"
    file = own if stage.address and own.is_file() else point.folder / "metrics.jsonl"
    if not file.is_file():
        return []
    return [
        (int(line["step"]), _number(line, "loss", f"{file}:{number}"))
        for number, line in read_lines(file)
        if line.get("stage") == stage.name and "step" in line and "loss" in line
    ]


def read_lines(file: Path) -> Iterator[tuple[int, JsonObject]]:
    """Iterate over (line number, object) of a JSON-lines file; an incomplete last line is left out."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; is this a folder of another program, or was the file moved?")
    text = file.read_text()
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                return
            raise ValueError(f"{file}:{number}: not JSON ({error.msg}); repair or remove the line") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file}:{number}: holds a {type(value).__name__}; each line is one object")
        yield number, value


def read_yaml(file: Path) -> JsonObject:
    """Read a YAML mapping. ValueError, in one line, for anything else."""
    try:
        value = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; it must be `name: value` lines")
    return value


def read_json(file: Path) -> JsonObject:
    """Read a JSON object. ValueError, in one line, for anything else."""
    try:
        value = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON ({error.msg}); repair or remove it") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}; it must be one object")
    return value


def _sweep_point(sweep: Path, row: JsonObject, where: str) -> PointResult:
    needed: dict[str, type] = {"point": str, "group": str, "status": str, "seed": int}
    optional: dict[str, type] = {"options": dict, "error": list, "stages": list}
    for name, kind in {**needed, **optional}.items():
        if not isinstance(row.get(name), kind) and (name in needed or row.get(name) is not None):
            raise ValueError(f"{where}: {name} is {row.get(name)!r}; it must be a {kind.__name__}")
    folder = sweep / str(row.get("run") or f"points/{row['point']}")
    finished = row["status"] == "finished"
    if finished and not folder.is_dir():
        raise ValueError(
            f"{where}: {folder} is missing, but the point is finished; restore it, or run the sweep again"
        )
    cost, settings = folder / "cost.json", folder / "run.yaml"
    if finished and "train_seconds" not in row and cost.is_file():  # rows that lack the sums
        row = {**row, **training_costs(read_json(cost).get("stages") or [])}
    return PointResult(
        id=row["point"],
        label=str(row.get("label") or row["point"]),
        group=row["group"],
        folder=folder,
        seed=row["seed"],
        status=row["status"],
        baseline=bool(row.get("baseline")),
        error=tuple(map(str, row.get("error") or ())),
        options=row.get("options") or {},
        costs=_costs(row, where),
        stages=tuple(_stage(stage, where) for stage in row.get("stages") or ()),
        launch_seconds=_number(row, "launch_seconds", where),
        samples=read_sample_folder(folder / "samples") if finished else SampleFolder(),
        settings=flatten(read_yaml(settings)) if settings.is_file() else {},
    )


def _costs(row: Mapping[str, object], where: str) -> dict[str, float]:
    return {name: _number(row, name, where) for name in COSTS if row.get(name) is not None}


def _stage(stage: object, where: str) -> StageResult:
    if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
        raise ValueError(f"{where}: a stage is {stage!r}; it must have a name")
    return StageResult(
        name=stage["name"],
        address=str(stage.get("address") or ""),
        steps=int(stage.get("steps") or 0),
        shared=bool(stage.get("shared")),
        seconds=_number(stage, "seconds", where),
        step_seconds=_number(stage, "step_seconds", where),
    )


def _number(row: Mapping[str, object], name: str, where: str) -> float:
    value = row.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {name} is {value!r}; it must be a number")
    return float(value)


def _run_log(file: Path) -> tuple[StageResult, ...]:
    """Return the stages in a run's log."""
    seconds: dict[str, list[float]] = {}
    for number, line in read_lines(file):
        if "step" in line and "validation" not in line:
            seconds.setdefault(str(line.get("stage")), []).append(
                _number(line, "seconds", f"{file}:{number}")
            )
    return tuple(
        StageResult(name=name, steps=len(own), seconds=sum(own), step_seconds=sorted(own)[len(own) // 2])
        for name, own in seconds.items()
    )


def _groups(points: Sequence[PointResult]) -> Iterator[Group]:
    """Iterate over groups in the order of their first points; labels are made unique."""
    members: dict[str, list[PointResult]] = {}
    for point in points:
        members.setdefault(point.group, []).append(point)
    labels = {group: _label(own) for group, own in members.items()}
    for group, own in members.items():
        twice = list(labels.values()).count(labels[group]) > 1
        label = f"{labels[group]} ({group})" if twice else labels[group]
        yield Group(id=group, label=label, points=tuple(sorted(own, key=lambda point: point.seed)))


def _label(points: Sequence[PointResult]) -> str:
    """Return the points' common label, or their options if labels differ between seeds."""
    if len({point.label for point in points}) == 1 or not points[0].options:
        return points[0].label
    return ", ".join(f"{name.split('.')[-1]} {value}" for name, value in points[0].options.items())
