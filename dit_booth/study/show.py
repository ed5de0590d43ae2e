"""What a sweep says on the terminal: its plan with the estimated cost, and how it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dit_booth.study.launch import title
from dit_booth.study.plan import Plan, StageRef
from dit_booth.study.processes import ending
from dit_booth.study.rows import FAILED, in_use, read_json, stage_finished, status_of, steps_done

SCORES = ("palette", "shape", "clip_i", "clip_t", "psnr", "motion")
"""Scores of the table on the terminal; the report has all."""


def show_plan(plan: Plan) -> str:
    """Points, stages, what is shared, what is already there, and what the rest is estimated to cost."""
    lines = [
        f"sweep {plan.name}: {len(plan.points)} points in {plan.folder}, stages in {plan.store}",
        "",
        "points",
    ]
    for point in plan.points:
        chain = " -> ".join(f"{stage.name}-{stage.address[:6]}" for stage in point.stages) or "no stage"
        mark = " (baseline)" if point.baseline else ""
        lines.append(f"  {status_of(plan, point):9} {title(point)}{mark}: {chain}")
    uses = plan.uses()
    stages = {stage.key: stage for point in plan.points for stage in point.stages}
    there = {key: steps_done(plan, stage) for key, stage in stages.items()}
    lines += ["", "stages"]
    for key, stage in stages.items():
        shared = f"shared by {uses[key]} points" if uses[key] > 1 else "of one point"
        lines.append(f"  {_state(plan, stage, there[key]):28} {key}: {stage.steps} steps, {shared}")
    missing = {key: stage.steps - there[key] for key, stage in stages.items() if stage.steps > there[key]}
    steps = sum(stage.steps for stage in stages.values())
    naive = sum(stage.steps * uses[key] for key, stage in stages.items())
    lines += [
        "",
        f"steps to train: {sum(missing.values())} of {steps}; with no stage shared there would be {naive}",
        *_estimate(plan, missing),
    ]
    return "\n".join(lines)


def _estimate(plan: Plan, missing: Mapping[str, int]) -> list[str]:
    """What the missing steps (by stage) are estimated to take, and on what that rests."""
    measured = step_seconds(plan)
    speeds = {key: measured.get(key) or measured.get(key.partition("-")[0]) for key in missing}
    known = {key: speed for key, speed in speeds.items() if speed}
    total, lines = sum(missing[key] * speed for key, speed in known.items()), list[str]()
    if known:
        lines.append(f"  {sum(missing[key] for key in known)} steps by step times of finished stages")
    open_ = [key for key in missing if key not in known]
    if open_:
        from dit_booth.study.estimate import flops_of_steps, rate_of  # PyTorch, and seconds of counting

        flops, rate = flops_of_steps(plan, open_), rate_of(plan)
        work = sum(missing[key] * flops[key] for key in open_)
        total += work / rate.flops
        lines.append(
            f"  {sum(missing[key] for key in open_)} steps by their FLOPs ({work:.3g}, counted without encoders) at"
            f" {rate.flops / 1e12:.3g} TFLOP/s, {rate.basis}"
        )
    if missing:
        about = "one point after the other, without sampling and launching"
        lines.insert(0, f"estimate: about {_duration(total)} of training, {about}")
    return lines


def show_rows(plan: Plan, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of all points with a few scores, failures with their last words, and where everything is."""
    names = [name for name in SCORES if any(name in row["metrics"] for row in rows)]
    width = max(len(f"{row['label']}, seed {row['seed']}") for row in rows)
    lines = [f"{'point':{width}}  {'status':9}" + "".join(f"{name:>11}" for name in names)]
    for row in rows:
        scores = "".join(f"{row['metrics'].get(name, {}).get('mean', float('nan')):11.3f}" for name in names)
        label = f"{row['label']}, seed {row['seed']}"
        told = scores if row["metrics"] else _ending(plan, row)
        lines.append(f"{label:{width}}  {row['status']:9}{told}".rstrip())
        lines += [f"    {line}" for line in row["error"][-2:]]
    launches = [row["launch_seconds"] for row in rows if row["launch_seconds"]]
    if launches:
        lines.append(f"launching a point took {min(launches):.0f} to {max(launches):.0f} s")
    lines.append(f"rows: {plan.folder / 'sweep.jsonl'}; page: dit-booth report {plan.folder}")
    return "\n".join(lines)


def _ending(plan: Plan, row: Mapping[str, Any]) -> str:
    """How a point that failed ended: of one that was killed it may be all that is known."""
    if row["status"] != "failed":
        return ""
    code = read_json(plan.folder / row["run"] / FAILED).get("exit")
    return "" if code is None else f"  ({ending(code)})"


def step_seconds(plan: Plan) -> dict[str, float]:
    """Measured seconds of a step: of each finished stage by its key, and by stage name the slowest that is known."""
    out: dict[str, float] = {}
    for point in plan.points:
        for stage in point.stages:
            measured = read_json(plan.stage_folder(stage) / "cost.json").get("step_seconds")
            if measured:
                out[stage.key] = measured
                out[stage.name] = max(measured, out.get(stage.name, 0.0))
    return out


def _state(plan: Plan, stage: StageRef, there: int) -> str:
    if stage_finished(plan, stage):
        return "finished"
    if in_use(plan.stage_folder(stage)):
        return f"in training, past step {there}"
    return f"goes on at step {there}" if there else "to train"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
