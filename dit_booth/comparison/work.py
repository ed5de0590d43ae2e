"""The work of a comparison: train a system, for all subjects or for one, sample its videos, and score them."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dit_booth.comparison.plan import Plan, shared_config, subject_config
from dit_booth.comparison.subjects import Subject
from dit_booth.components import Components, build
from dit_booth.config import RunConfig, SampleConfig, SampleReference, SubjectConfig
from dit_booth.evaluation.folder import write_prompts
from dit_booth.evaluation.scores import write_scores
from dit_booth.files import Lock, write_text
from dit_booth.run import train_stages
from dit_booth.sampling.measure import score_cases
from dit_booth.sampling.prior import prior_seconds
from dit_booth.sampling.prompts import sample_prompts
from dit_booth.training.address import digest, stages_of
from dit_booth.training.distributed import Ranks, free_memory
from dit_booth.training.metrics_logger import MetricsLogger
from dit_booth.training.stage_cost import COST

log = logging.getLogger("dit_booth")
Record = dict[str, Any]
"""A subject's marker: `address` of what made it, `rows` of videos.csv, and what it cost."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A system at one training seed, on all subjects; its folder is that of a sweep's point."""

    plan: Plan
    seed: int
    folder: Path
    subjects: tuple[Subject, ...]
    sample: SampleConfig
    controls: tuple[SampleReference, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.plan.system.name}-s{self.seed}"

    @property
    def place(self) -> Path:
        return self.folder / "points" / self.id

    @property
    def config(self) -> RunConfig:
        """The run that trains the system: for all subjects, or for one that `config_for` names."""
        return shared_config(self.plan, self.seed, self.folder, self.folder / "runs" / self.id)

    def config_for(self, subject: Subject) -> RunConfig:
        """Return the run that serves a subject: its own, or the system's."""
        if self.plan.system.kind != "subject":
            return self.config
        own = subject_config(self.config, subject)
        return replace(own, out=f"{own.out}/{subject.index:03d}")

    def marker(self, subject: Subject) -> Path:
        return self.place / "subjects" / f"{subject.index:03d}.json"

    def scores(self, subject: Subject) -> Path:
        return self.place / "subjects" / f"{subject.index:03d}.jsonl"

    def record(self, subject: Subject) -> Record | None:
        """Return a subject's record; None if it is not done, or was made by other settings."""
        file = self.marker(subject)
        if not file.is_file():
            return None
        record: Record = json.loads(file.read_text())
        return record if record["address"] == self.address(subject) else None

    def address(self, subject: Subject) -> str:
        """Return the hash of what a subject's record depends on: trained stages, settings of sampling, and prompts."""
        config, after = self.config_for(subject), self.subjects[(subject.index + 1) % len(self.subjects)]
        return digest(
            [
                [stage.address for stage in stages_of(config)],
                replace(config, subject=SubjectConfig(token=config.subject.token)).fingerprint(),
                [self.sample.seeds, self.sample.fps, self.controls],
                [
                    subject.request.prompt,
                    subject.request.caption,
                    after.request.prompt if self.controls else "",
                ],
            ]
        )


def work(point: Point, ranks: Ranks) -> None:
    """Do what is left of a point and no other process does, one subject after the other; each ends with its marker."""
    alone = point.plan.system.kind == "subject"
    for group in [[subject] for subject in point.subjects] if alone else [point.subjects]:
        lock = Lock(point.place, f"{group[0].index:03d}.lock")
        if not lock.take():
            log.info("%s, subject %d: another process's (%s)", point.id, group[0].index + 1, lock.owner())
            continue
        try:
            _serve(point, [subject for subject in group if point.record(subject) is None], ranks)
        finally:
            lock.release()


def _serve(point: Point, subjects: Sequence[Subject], ranks: Ranks) -> None:
    if not subjects:
        return
    components, seconds = train(point.config_for(subjects[0]), ranks)
    for subject in subjects:
        sample_subject(point, components, subject, ranks, seconds)
        log.info("%s: subject %d of %d", point.id, subject.index + 1, len(point.subjects))
    del components
    free_memory(ranks)


def train(config: RunConfig, ranks: Ranks) -> tuple[Components, float]:
    """Train the stages of a run that are not trained yet; return its components, and the seconds of all stages."""
    folder, stages = Path(config.out), stages_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    logger = MetricsLogger(folder, time.perf_counter())
    try:
        components = train_stages(build(config).to(ranks.device), stages, folder, ranks, logger)
    finally:
        logger.close()
    components.model.requires_grad_(False)
    return components, sum(_seconds(stage.folder(config)) for stage in stages if stage.steps)


def _seconds(stage: Path) -> float:
    """Return the seconds of a stage's steps, and of its class images."""
    steps: float = json.loads((stage / COST).read_text())["seconds"]
    return steps + prior_seconds(stage)


def sample_subject(
    point: Point, components: Components, subject: Subject, ranks: Ranks, train_seconds: float
) -> None:
    """Sample and score a subject's videos, and write its marker last."""
    out, sample = point.place / "samples", point.sample
    requests = [other.request for other in point.subjects]
    start = time.perf_counter()
    cases = sample_prompts(components, sample, requests, out, ranks, only=[subject.index])
    sampled = time.perf_counter() - start
    if point.controls:
        floors = replace(sample, references=point.controls)
        cases |= sample_prompts(components, floors, requests, out, ranks, only=[subject.index])
    rows = write_prompts(out, cases, sample.fps, subject.index)
    write_scores(point.scores(subject), score_cases(components, cases))
    record = {
        "address": point.address(subject),
        "rows": [asdict(row) for row in rows],
        "sample_seconds": sampled,
        "train_seconds": train_seconds,
        "bytes": _stored(point.config_for(subject)) if point.plan.system.kind == "subject" else 0,
    }
    write_text(point.marker(subject), json.dumps(record) + "\n")


def _stored(config: RunConfig) -> int:
    """Return the bytes of what a subject's optimization leaves: the weights that it trained."""
    files = [stage.folder(config) / "weights.safetensors" for stage in stages_of(config) if stage.steps]
    return sum(file.stat().st_size for file in files)
