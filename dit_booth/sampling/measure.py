"""Measure a run's videos, and the ground truth of their prompts in the same way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from dit_booth.components import Components
from dit_booth.evaluation import score, summary
from dit_booth.evaluation.case import Case, Scorer
from dit_booth.evaluation.folder import write_videos
from dit_booth.evaluation.learned.clip_score import clip_scores
from dit_booth.evaluation.palette import video_palette_distance
from dit_booth.evaluation.pixels import psnr
from dit_booth.evaluation.scores import SCORES, write_scores
from dit_booth.evaluation.shape import video_shape_overlap
from dit_booth.sampling.contact_sheet import SheetRow, contact_sheet

log = logging.getLogger(__name__)

Means = dict[str, dict[str, float]]
"""Metric -> mean, stderr, n."""
SHEET_ROWS = 12


def measure(components: Components, cases: Mapping[str, Case], out: Path) -> dict[str, Means]:
    """Score videos (by file name), write files into `out`; return means over the prompts by control.

    The ground truth of each prompt is scored, too, as control ``truth``.
    """
    config = components.config
    scorers = run_scorers(components)
    truths = {
        case.prompt: replace(case, video=case.truth, control="truth", noise_seed=0, given=None)
        for case in cases.values()
        if case.truth is not None
    }
    every = [*cases.values(), *truths.values()]
    scores = [one for case in every for one in score(case, scorers, seed=config.train.seed)]
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
    controls = dict.fromkeys(case.control for case in every)
    means = {
        control: {name: asdict(value) for name, value in summary(scores, control).items()}
        for control in controls
    }
    for name, statistic in means[first].items():
        truth = means.get("truth", {}).get(name, {}).get("mean")
        beside = "" if truth is None else f"   truth {truth:8.3f}"
        log.info("  %-18s %8.3f +- %.3f%s", name, statistic["mean"], statistic["stderr"], beside)
    return means


def run_scorers(components: Components) -> list[Scorer]:
    """Return the scorers that a run has without a download: of the pixels, and of its own encoders."""
    device, text = components.device, components.model.text

    def clip(case: Case) -> dict[str, float]:
        found = clip_scores(
            [case.video],
            [case.image],
            [case.caption],
            lambda images: components.image_encoder(images.to(device)).embedding,
            lambda captions: text(text.tokenize(list(captions))).pooled,
        )
        return {name: values[0] for name, values in found.items()}

    def pixels(case: Case) -> dict[str, float]:
        colour = video_palette_distance(case.video, case.image)
        out = {"palette": colour.distance, "subject_found": colour.found}
        if case.identity:
            out["shape"] = video_shape_overlap(case.video, case.identity["shape"])
        if case.truth is not None and case.control != "truth":
            out["psnr"] = psnr(case.video, case.truth)
        return out

    return [pixels, clip]
