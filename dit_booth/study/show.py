"""Terminal output of a sweep: its plan with the estimated cost, and the table of its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dit_booth.study.launch import title
from dit_booth.study.plan import StageRef, SweepPlan
from dit_booth.study.processes import exit_text
from dit_booth.study.rows import FAILED, SweepRow, in_use, read_json, stage_finished, status_of, steps_done

SCORES = ("appearance", "right_shape", "palette", "judge_i", "psnr", "speed")
"""Scores shown on the terminal; the report has all."""


def show_plan(plan: SweepPlan) -> str:
    """Return the points and stages as text: what is shared, what is finished, and the estimated cost of the rest."""
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


def _estimate(plan: SweepPlan, missing: Mapping[str, int]) -> list[str]:
    """Return the estimated duration of the missing steps (by stage), and its basis."""
    measured = step_seconds(plan)
    speeds = {key: measured.get(key) or measured.get(key.partition("-")[0]) for key in missing}
    known = {key: speed for key, speed in speeds.items() if speed}
    total, lines = sum(missing[key] * speed for key, speed in known.items()), list[str]()
    if known:
        lines.append(f"  {sum(missing[key] for key in known)} steps by step times of finished stages")
    unknown = [key for key in missing if key not in known]
    if unknown:
        from dit_booth.study.estimate import flops_of_steps, rate_of  # PyTorch, and seconds of counting

        flops, rate = flops_of_steps(plan, unknown), rate_of(plan)
        work = sum(missing[key] * flops[key] for key in unknown)
        total += work / rate.flops
        lines.append(
            f"  {sum(missing[key] for key in unknown)} steps by their FLOPs ({work:.3g}, counted without encoders) at"
            f" {rate.flops / 1e12:.3g} TFLOP/s, {rate.basis}"
        )
    if missing:
        about = "one point after the other, without sampling and launching"
        lines.insert(0, f"estimate: about {_duration(total)} of training, {about}")
    return lines


def show_rows(plan: SweepPlan, rows: Sequence[SweepRow]) -> str:
    """Return a table of all points with a few scores and the last lines of failures, and where the files are."""
    names = [name for name in SCORES if any(name in row["metrics"] for row in rows)]
    width = max(len(f"{row['label']}, seed {row['seed']}") for row in rows)
    lines = [f"{'point':{width}}  {'status':9}" + "".join(f"{name:>11}" for name in names)]
    for row in rows:
        label = f"{row['label']}, seed {row['seed']}"
        result = (
            "".join(f"{_mean(row, name):11.3f}" for name in names) if row["metrics"] else _exit(plan, row)
        )
        lines.append(f"{label:{width}}  {row['status']:9}{result}".rstrip())
        lines += [f"    {line}" for line in row["error"][-2:]]
    launches = [row["launch_seconds"] for row in rows if row["launch_seconds"]]
    if launches:
        lines.append(f"launching a point took {min(launches):.0f} to {max(launches):.0f} s")
    lines.append(f"rows: {plan.folder / 'sweep.jsonl'}; page: dit-booth report {plan.folder}")
    return "\n".join(lines)


def _mean(row: SweepRow, name: str) -> float:
    mean = row["metrics"][name]["mean"] if name in row["metrics"] else None
    return float("nan") if mean is None else mean


def _exit(plan: SweepPlan, row: SweepRow) -> str:
    """Return the exit code of a failed point, for a killed one all that is known; else nothing."""
    if row["status"] != "failed":
        return ""
    code = read_json(plan.folder / row["run"] / FAILED).get("exit")
    return "" if code is None else f"  ({exit_text(code)})"


def step_seconds(plan: SweepPlan) -> dict[str, float]:
    """Return measured seconds per step: of finished stages by key, and by stage name the slowest one's."""
    out: dict[str, float] = {}
    for point in plan.points:
        for stage in point.stages:
            measured = read_json(plan.stage_folder(stage) / "cost.json").get("step_seconds")
            if measured:
                out[stage.key] = measured
                out[stage.name] = max(measured, out.get(stage.name, 0.0))
    return out


def _state(plan: SweepPlan, stage: StageRef, there: int) -> str:
    if stage_finished(plan, stage):
        return "finished"
    if in_use(plan.stage_folder(stage)):
        return f"in training, past step {there}"
    return f"goes on at step {there}" if there else "to train"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
