"""The contents of a report: points (one run each), groups (points that differ in the seed only), the study."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dit_booth.evaluation.folder import VideoRow
from dit_booth.evaluation.scores import Score
from dit_booth.study.description import REFERENCES
from dit_booth.study.primary import Primary

PLACES = ("out", "store", "stop_after", "data.workers", "train.checkpoint_every", REFERENCES)
"""Settings that do not change a method's results."""
COSTS = (
    "trained_parameters", "flops_per_step", "step_seconds", "peak_memory_mib", "train_flops", "train_seconds",
    "wall_seconds", "tuning_free", "subject_flops", "subject_seconds", "subject_bytes", "shared_flops",
)  # fmt: skip


Measured = Mapping[tuple[str, str], Mapping[str, tuple[Score, ...]]]
"""(control, metric) -> prompt -> its scores, one for each noise seed."""


@dataclass(frozen=True, kw_only=True)
class SampleFolder:
    """The scores and videos of a run's folder ``samples``, or of any folder that ``dit-booth evaluate`` has scored."""

    folder: Path = Path()
    measured: Measured = field(default_factory=dict)
    videos: tuple[VideoRow, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Videos that could not be scored, with the reason."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return the prompts of the method's own videos that have a score, in order."""
        own = (prompts for (control, _), prompts in self.measured.items() if not control)
        return tuple(dict.fromkeys(prompt for prompts in own for prompt in prompts if prompt))

    @property
    def own_videos(self) -> tuple[VideoRow, ...]:
        """Return the method's own videos of one noise seed, the first: one for each prompt."""
        own = [video for video in self.videos if not video.control]
        return tuple(video for video in own if video.noise_seed == own[0].noise_seed)


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """A stage of a point; equal addresses are one training."""

    name: str
    address: str = ""
    steps: int = 0
    shared: bool = False
    seconds: float = math.nan
    step_seconds: float = math.nan


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """One run of a sweep: a row of ``sweep.jsonl`` and what lies in its run folder."""

    id: str
    label: str
    group: str
    folder: Path
    seed: int = 0
    status: str = "finished"
    baseline: bool = False
    error: tuple[str, ...] = ()
    options: dict[str, object] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    stages: tuple[StageResult, ...] = ()
    launch_seconds: float = math.nan
    samples: SampleFolder = SampleFolder()
    settings: dict[str, object] = field(default_factory=dict)
    """`run.yaml`, flat: ``{"stages.fine.steps": 150}``."""

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True, kw_only=True)
class Group:
    """The points that differ in the seed only: a row of the table."""

    id: str
    label: str
    points: tuple[PointResult, ...]

    @property
    def finished(self) -> tuple[PointResult, ...]:
        return tuple(point for point in self.points if point.finished)

    @property
    def status(self) -> str:
        """Return the status of all points, or a count of each: ``1 failed, 1 waiting``."""
        counts = Counter(point.status for point in self.points)
        return ", ".join(f"{n} {status}" if len(counts) > 1 else status for status, n in counts.items())

    @property
    def options(self) -> dict[str, object]:
        return self.points[0].options

    @property
    def baseline(self) -> bool:
        return any(point.baseline for point in self.points)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The data of a page."""

    title: str
    folder: Path
    groups: tuple[Group, ...]
    about: str = ""
    sweep: bool = True
    """True for a sweep's folder, false for run folders."""
    commands: tuple[str, ...] = ()
    description: str = ""
    """Text of ``sweep.yaml``."""
    primary: Primary | None = None

    @property
    def points(self) -> tuple[PointResult, ...]:
        return tuple(point for group in self.groups for point in group.points)
