"""Measure a run's videos, and the ground truth of their prompts in the same way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from dit_booth.components import Components
from dit_booth.evaluation import score, summary
from dit_booth.evaluation.case import Case, Scorer
from dit_booth.evaluation.folder import write_videos
from dit_booth.evaluation.motion import flicker_scores, motion_scores
from dit_booth.evaluation.oracle import oracle_scores
from dit_booth.evaluation.palette import palette_scores
from dit_booth.evaluation.pixels import psnr_scores
from dit_booth.evaluation.scores import SCORES, Score, write_scores
from dit_booth.sampling.contact_sheet import SheetRow, contact_sheet
from dit_booth.sampling.scorers import judge_scorer, own_scorer

log = logging.getLogger(__name__)

Means = dict[str, dict[str, float]]
"""Metric -> mean, stderr, n."""
SHEET_ROWS = 12


def measure(components: Components, cases: Mapping[str, Case], out: Path) -> dict[str, Means]:
    """Score videos (by file name), write files into `out`; return means over the prompts by control.

    The ground truth of each prompt is scored, too, as control ``truth``.
    """
    config = components.config
    scores = score_cases(components, cases)
    write_scores(out / SCORES, scores)
    write_videos(out, cases, config.sample.fps)
    first = next(iter(cases.values())).control
    rows = [
        SheetRow(
            image=case.image if case.given is None else case.given,
            truth=case.truth,
            generated=case.video,
            caption=case.caption,
        )
        for case in cases.values()
        if case.control == first
    ]
    contact_sheet(rows[:SHEET_ROWS], out / "contact_sheet.png")
    controls = dict.fromkeys(one.control for one in scores)
    means: dict[str, Means] = {
        control: {name: asdict(value) for name, value in summary(scores, control).items()}
        for control in controls
    }
    for name, statistic in means[first].items():
        truth = means.get("truth", {}).get(name, {}).get("mean")
        beside = "" if truth is None else f"   truth {truth:8.3f}"
        log.info("  %-18s %8.3f +- %.3f%s", name, statistic["mean"], statistic["stderr"], beside)
    return means


def score_cases(components: Components, cases: Mapping[str, Case]) -> list[Score]:
    """Score videos by a run's own scorers, and after them the ground truth of each prompt."""
    scorers, seed = run_scorers(components), components.config.train.seed
    truths = {case.prompt: case.as_truth() for case in cases.values() if case.truth is not None}
    return [one for case in (*cases.values(), *truths.values()) for one in score(case, scorers, seed=seed)]


def run_scorers(components: Components) -> list[Scorer]:
    """Return the scorers without a download: the exact ones and judges on the toy world, else of the subject seen."""
    own = own_scorer(components)
    if components.config.data.kind == "toyworld":
        return [
            oracle_scores,
            palette_scores,
            flicker_scores,
            psnr_scores,
            own,
            judge_scorer(components.device),
        ]
    return [motion_scores, psnr_scores, own]
