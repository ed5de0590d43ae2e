"""Write a sweep as a list of jobs: a Slurm script, or a shell script.

A stage that several points share is a separate job, on which its points depend; other stages are trained in their
point's job. All jobs may be submitted again: finished work is skipped.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dit_booth.study.launch import RUN, title, write_settings
from dit_booth.study.plan import Point, SweepPlan
from dit_booth.study.rows import stage_finished, status_of

Kind = Literal["slurm", "shell"]


@dataclass(frozen=True)
class Job:
    """A command, and the names of the jobs that must succeed before it."""

    name: str
    about: str
    command: str
    after: tuple[str, ...]


def jobs_of(plan: SweepPlan, kind: Kind) -> list[Job]:
    """Return the missing jobs; each comes after those that it depends on."""
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


def emit(plan: SweepPlan, kind: Kind) -> str:
    """Return the script. Run it in the folder in which the sweep was planned: paths are relative to it."""
    jobs = jobs_of(plan, kind)
    lines = _slurm(plan, jobs) if kind == "slurm" else _shell(jobs)
    return "\n".join([f"#!/usr/bin/env bash\n# Sweep {plan.name}: {len(jobs)} jobs. Made by dit-booth sweep --emit"
                      f" {kind}; afterwards run the sweep itself to collect the rows.", *lines]) + "\n"  # fmt: skip


def _slurm(plan: SweepPlan, jobs: list[Job]) -> Iterator[str]:
    yield "set -euo pipefail"
    yield '# With options of your cluster: SBATCH="sbatch --partition=gpu --time=12:00:00" bash THIS'
    yield "SBATCH=${SBATCH:-sbatch}"
    for job in jobs:
        after = ""
        if job.after:  # dependents of a failed job are cancelled, else they wait forever
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


def _command(plan: SweepPlan, kind: Kind, point: Point, number: int, flags: str = "") -> str:
    """Return a job's command; `number` selects its port, which jobs on one machine must not share."""
    config = shlex.quote(str(plan.run_folder(point) / "run.yaml"))
    start = "dit-booth run"
    if plan.launcher == "deepspeed":
        start = f"deepspeed --master_port {29500 + number} {_ranks(plan.ranks, kind)} --module {RUN}"
    return f"{start} --config {config} {flags}".rstrip()


def _ranks(ranks: int, kind: Kind) -> str:
    """Return the flag for the number of ranks; without it, DeepSpeed starts a rank on every visible GPU.

    With it, DeepSpeed takes the machine's first GPUs and ignores CUDA_VISIBLE_DEVICES, in which
    Slurm names the job's GPUs (as many as `ranks`).
    """
    flag = f"--num_gpus {ranks}"
    return flag if kind == "shell" else f'$([ -n "${{CUDA_VISIBLE_DEVICES:-}}" ] || echo {flag})'
