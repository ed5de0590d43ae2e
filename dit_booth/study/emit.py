"""A sweep as a list of jobs for something else to run: a Slurm script, or a shell script.

A stage that several points share is a job of its own, and what builds on it depends on that job. A stage that only one
point has is trained in the point's job. All jobs may be submitted again: what is finished is left alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dit_booth.study.launch import RUN, title, write_settings
from dit_booth.study.plan import Plan, Point
from dit_booth.study.rows import stage_finished, status_of

Kind = Literal["slurm", "shell"]


@dataclass(frozen=True)
class Job:
    """A command, and the names of the jobs that must have ended well before it."""

    name: str
    about: str
    command: str
    after: tuple[str, ...]


def jobs_of(plan: Plan, kind: Kind) -> list[Job]:
    """What is missing, in an order in which every job stands behind those that it depends on."""
    uses, jobs, stage_jobs = plan.uses(), list[Job](), dict[str, str]()
    for point in plan.points:
        if status_of(plan, point) == "finished":
            continue
        write_settings(plan, point)
        before: tuple[str, ...] = ()
        for stage in point.stages:
            if uses[stage.key] < 2 or stage_finished(plan, stage):
                continue
            if stage.key not in stage_jobs:
                name = f"stage_{stage.name}_{stage.address}"
                out = plan.folder / "jobs" / stage.key
                jobs.append(
                    Job(
                        name,
                        f"stage {stage.name}, {stage.steps} steps, shared by {uses[stage.key]} points",
                        _command(
                            plan,
                            kind,
                            point,
                            len(jobs),
                            f"--out {shlex.quote(str(out))} --stop-after {stage.name}",
                        ),
                        before,
                    )
                )
                stage_jobs[stage.key] = name
            before = (stage_jobs[stage.key],)
        jobs.append(Job(f"point_{point.id}", title(point), _command(plan, kind, point, len(jobs)), before))
    return jobs


def emit(plan: Plan, kind: Kind) -> str:
    """The script. Run it where the sweep was planned: its paths are relative to that folder."""
    jobs = jobs_of(plan, kind)
    lines = _slurm(plan, jobs) if kind == "slurm" else _shell(jobs)
    return "\n".join([f"#!/usr/bin/env bash\n# Sweep {plan.name}: {len(jobs)} jobs. Made by dit-booth sweep --emit"
                      f" {kind}; afterwards run the sweep itself to collect the rows.", *lines]) + "\n"  # fmt: skip


def _slurm(plan: Plan, jobs: list[Job]) -> Iterator[str]:
    yield "set -euo pipefail"
    yield '# With options of your cluster: SBATCH="sbatch --partition=gpu --time=12:00:00" bash THIS'
    yield "SBATCH=${SBATCH:-sbatch}"
    for job in jobs:
        after = ""
        if job.after:  # what depends on a job that failed ends too, and does not wait for ever
            names = ":".join(f"${name}" for name in job.after)
            after = f" --dependency=afterok:{names} --kill-on-invalid-dep=yes"
        yield f"\n# {job.about}"
        yield (
            f"{job.name}=$($SBATCH --parsable --job-name={job.name} --gpus-per-node={plan.ranks}{after}"
            f" --wrap {shlex.quote(job.command)})"
        )


def _shell(jobs: list[Job]) -> Iterator[str]:
    yield "set -uo pipefail\nfailed=0"
    for job in jobs:
        yield f"\n# {job.about}" + (f"; after {', '.join(job.after)}" if job.after else "")
        ready = " && ".join(f'[ "${{{name}:-1}}" = 0 ]' for name in job.after)
        yield (f"{ready} && " if ready else "") + f"{job.command}"
        yield f"{job.name}=$?; [ ${job.name} = 0 ] || failed=1"
    yield "exit $failed"


def _command(plan: Plan, kind: Kind, point: Point, number: int, more: str = "") -> str:
    """`number`: the job's; two jobs on one machine must not meet at one port."""
    config = shlex.quote(str(plan.run_folder(point) / "run.yaml"))
    start = "dit-booth run"
    if plan.launcher == "deepspeed":
        start = f"deepspeed --master_port {29500 + number} {_ranks(plan.ranks, kind)} --module {RUN}"
    return f"{start} --config {config} {more}".rstrip()


def _ranks(ranks: int, kind: Kind) -> str:
    """Without a number, DeepSpeed starts a rank on every GPU that it sees.

    With one it takes the machine's first GPUs and ignores CUDA_VISIBLE_DEVICES, in which Slurm names those of the job,
    exactly as many as `ranks`.
    """
    flag = f"--num_gpus {ranks}"
    return flag if kind == "shell" else f'$([ -n "${{CUDA_VISIBLE_DEVICES:-}}" ] || echo {flag})'
