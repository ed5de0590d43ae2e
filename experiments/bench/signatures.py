"""Signatures of the compared systems: what each one's own paper says of it, measured on the toy world.

    python -m experiments.bench.signatures --out runs/signatures                        # hours; resumable
    python -m experiments.bench.signatures --out runs/signatures --only text2video_zero

Each sign is a paired difference over the same subjects, noise and training seeds, with its 95 % interval (crossed
random effects of seeds and subjects). Systems are trained by `dit-booth compare` in folders under `--out`; a second
call trains nothing again. Writes ``signatures.jsonl`` (a line for each sign, with all values) and prints a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from einops import rearrange
from torch import Tensor

from dit_booth.comparison.compare import Comparison, compare
from dit_booth.comparison.subjects import Subject
from dit_booth.comparison.work import Point, train
from dit_booth.evaluation.folder import VideoFolder
from dit_booth.evaluation.palette import palette_distance, palette_distances, subject_palette
from dit_booth.evaluation.scores import SCORES, read_scores
from dit_booth.evaluation.segment import subject_masks
from dit_booth.sampling.prior import sample_class_images
from dit_booth.study.statistics import Scores, differences, paired_difference
from dit_booth.training.distributed import Ranks, start, stop
from experiments.bench.measure import write_lines

System = Literal["dreambooth", "textual_inversion", "tune_a_video", "text2video_zero", "elite"]
CLASS_IMAGES = 8
Values = dict[int, dict[str, float]]
"""Training seed -> subject's prompt -> value: `statistics.Scores` to be filled."""


@dataclass(frozen=True, kw_only=True)
class SignatureArguments:
    out: Path = Path("runs/signatures")
    """Folder of the comparisons, and of the result."""
    budget: str = "60s"
    """Budget of every system for one subject, as of dit-booth compare."""
    subjects: int = 8
    """Subjects: the first prompts of the test split."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training."""
    amortise: int = 12
    """Subjects that share the training of ELITE."""
    short: tuple[str, ...] = ("8s", "20s")
    """Budgets of Tune-A-Video below `budget`: fewer steps."""
    only: tuple[
        Literal["dreambooth", "textual_inversion", "tune_a_video", "text2video_zero", "elite"], ...
    ] = ()
    """Systems whose signs to measure; empty: all."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A claim as `ours` minus `theirs` of one quantity; `expected`: the sign of that difference by the paper."""

    system: System
    claim: str
    quantity: str
    expected: Literal[-1, 1]
    ours: Scores
    theirs: Scores

    def line(self) -> dict[str, Any]:
        found = paired_difference(self.ours, self.theirs)
        assert found is not None, self.claim
        apart = [value for row in differences(self.ours, self.theirs).values() for value in row.values()]
        return {
            "system": self.system,
            "claim": self.claim,
            "quantity": self.quantity,
            "expected": self.expected,
            "ours": mean(self.ours),
            "theirs": mean(self.theirs),
            "difference": found.mean,
            "low": found.main.low,
            "high": found.main.high,
            "agree": sum(value * self.expected > 0 for value in apart),
            "pairs": len(apart),
            "values": {"ours": self.ours, "theirs": self.theirs},
        }


def main(settings: SignatureArguments) -> None:
    torch.set_num_threads(1)
    chosen = settings.only or tuple(SIGNS)
    lines = [sign.line() for name in chosen for sign in SIGNS[name](settings)]
    write_lines(settings.out / "signatures.jsonl", lines)
    print("| system | claim | quantity | with | without | difference | expected | pairs that agree |")
    print("|---|---|---|---:|---:|---:|:---:|---:|")
    for line in lines:
        difference = f"{line['difference']:+.3g} ({line['low']:+.3g} to {line['high']:+.3g})"
        print(
            f"| {line['system']} | {line['claim']} | {line['quantity']} | {line['ours']:.3g} | {line['theirs']:.3g}"
            f" | {difference} | {'+' if line['expected'] > 0 else '-'} | {line['agree']} of {line['pairs']} |"
        )


# ---- the signs ---------------------------------------------------------------------------------------------


def of_dreambooth(settings: SignatureArguments) -> list[Sign]:
    """Compare class images after tuning, with and without prior preservation (section 4.4, table 3)."""
    kept, lost = (points_of(settings, "all", name) for name in ("dreambooth", "dreambooth_no_prior"))
    images = [by_subject(points, class_images) for points in (kept, lost)]
    claim = "with class images, the class stays more diverse"
    diverse = [values_of(points, made, diversity) for points, made in zip((kept, lost), images, strict=True)]
    alike = [values_of(points, made, distance) for points, made in zip((kept, lost), images, strict=True)]
    return [
        Sign(system="dreambooth", claim=claim, quantity="palette between class images, ΔE", expected=1,
             ours=diverse[0], theirs=diverse[1]),
        Sign(system="dreambooth", claim="with class images, the class does not become the subject",
             quantity="palette of class images to the subject, ΔE", expected=1, ours=alike[0], theirs=alike[1]),
    ]  # fmt: skip


def of_textual_inversion(settings: SignatureArguments) -> list[Sign]:
    """Compare with DreamBooth, which changes the whole network (DreamBooth, table 1)."""
    words, network = (points_of(settings, "all", name) for name in ("textual_inversion", "dreambooth"))
    stored = [by_subject(points, stored_bytes) for points in (words, network)]
    return [
        Sign(system="textual_inversion", claim="below DreamBooth in identity", quantity="appearance, ΔE", expected=1,
             ours=scores_of(words, "appearance"), theirs=scores_of(network, "appearance")),
        Sign(system="textual_inversion", claim="cheaper than DreamBooth in bytes", quantity="bytes per subject",
             expected=-1, ours=stored[0], theirs=stored[1]),
    ]  # fmt: skip


def of_tune_a_video(settings: SignatureArguments) -> list[Sign]:
    """Compare the most steps with fewer: prompts that were not tuned on are followed less (section 5)."""
    longest = points_of(settings, "all", "tune_a_video")
    out = []
    for budget in settings.short:
        fewer = points_of(settings, budget, "tune_a_video", budget=budget)
        few, many = (next(iter(points[0].plan.steps.values())) for points in (fewer, longest))
        out.append(
            Sign(system="tune_a_video", claim=f"{many} steps follow held-out prompts less than {few}",
                 quantity="judges text", expected=-1,
                 ours=scores_of(longest, "judge_t"), theirs=scores_of(fewer, "judge_t"))
        )  # fmt: skip
    return out


def of_text2video_zero(settings: SignatureArguments) -> list[Sign]:
    """Compare with unmoved latents, and with frames that do not read frame 0 (section 4.3)."""
    whole = points_of(settings, "all", "text2video_zero")
    still = points_of(settings, "no_warp", "text2video_zero", settings={"start": {"kind": "noise"}})
    apart = points_of(
        settings,
        "no_reading",
        "text2video_zero",
        settings={"dit": {"plan": "self"}, "unet": {"plan": "self"}},
    )
    return [
        Sign(system="text2video_zero", claim="with the warp it moves more", expected=1,
             quantity="speed of the subject, sides per frame",
             ours=scores_of(whole, "speed"), theirs=scores_of(still, "speed")),
        Sign(system="text2video_zero", claim="reading frame 0 keeps its subject", expected=-1,
             quantity="palette of later frames to frame 0, ΔE",
             ours=by_subject(whole, change), theirs=by_subject(apart, change)),
    ]  # fmt: skip


def of_elite(settings: SignatureArguments) -> list[Sign]:
    """Compare with the global mapping alone at the same budget (section 4.3)."""
    both, alone = (points_of(settings, "all", name) for name in ("elite", "elite_global"))
    claim = "with the local mapping it is closer in texture"
    return [
        Sign(system="elite", claim=claim, quantity="right texture", expected=1,
             ours=scores_of(both, "right_texture"), theirs=scores_of(alone, "right_texture")),
        Sign(system="elite", claim="and in appearance", quantity="appearance, ΔE", expected=-1,
             ours=scores_of(both, "appearance"), theirs=scores_of(alone, "appearance")),
    ]  # fmt: skip


SIGNS: Mapping[System, Callable[[SignatureArguments], list[Sign]]] = {
    "dreambooth": of_dreambooth,
    "textual_inversion": of_textual_inversion,
    "text2video_zero": of_text2video_zero,
    "tune_a_video": of_tune_a_video,
    "elite": of_elite,
}


# ---- their values ------------------------------------------------------------------------------------------


def points_of(
    arguments: SignatureArguments,
    folder: str,
    system: str,
    *,
    budget: str = "",
    settings: Mapping[str, object] | None = None,
) -> list[Point]:
    """Train and sample a system, or find that it is done; return a point for each seed."""
    return compare(
        Comparison(
            budget=budget or arguments.budget,
            split="test",
            subjects=arguments.subjects,
            methods=(system,),
            seeds=arguments.seeds,
            noise_seeds=(0,),
            amortise=arguments.amortise,
            folder=arguments.out / folder,
            settings=settings or {},
            command="python -m experiments.bench.signatures",
        )
    )


def scores_of(points: list[Point], metric: str) -> Values:
    """Return a metric's means over the frames of the systems' videos."""
    return {
        point.seed: {
            score.prompt: score.mean
            for score in read_scores(point.place / "samples" / SCORES)
            if score.metric == metric and not score.control
        }
        for point in points
    }


def by_subject(
    points: list[Point], value: Callable[[Point, Subject, Ranks], Any]
) -> dict[int, dict[str, Any]]:
    """Return what `value` computes of every subject of every point."""
    ranks = start()
    try:
        return {
            point.seed: {s.request.prompt: value(point, s, ranks) for s in point.subjects} for point in points
        }
    finally:
        stop()


def values_of(
    points: list[Point], made: Mapping[int, Mapping[str, Any]], value: Callable[[Any, Subject], float]
) -> Values:
    return {
        point.seed: {s.request.prompt: value(made[point.seed][s.request.prompt], s) for s in point.subjects}
        for point in points
    }


def class_images(point: Point, subject: Subject, ranks: Ranks) -> Tensor:
    """Sample images of the class by the network that was tuned on the subject: n 3 h w in [-1, 1]."""
    components, _ = train(point.config_for(subject), ranks)
    images = sample_class_images(components, range(CLASS_IMAGES))
    return rearrange(images, "n 1 c h w -> n c h w").float() / 127.5 - 1


def diversity(images: Tensor, _: Subject) -> float:
    """Return the mean palette distance between two class images."""
    palettes = [subject_palette(i, m) for i, m in zip(images, subject_masks(images), strict=True)]
    return statistics.mean(palette_distance(a, b) for a, b in combinations(palettes, 2))


def distance(images: Tensor, subject: Subject) -> float:
    """Return the mean palette distance of the class images to the subject's image."""
    return float(palette_distances(images, subject.request.image, subject_masks(images)).mean())


def change(point: Point, subject: Subject, _: Ranks) -> float:
    """Return the mean palette distance of a video's later frames to frame 0."""
    samples = VideoFolder(point.place / "samples" / "videos.csv")
    (video,) = (case.video for case in samples if case.prompt == subject.request.prompt and not case.control)
    masks = subject_masks(video)
    first = subject_palette(video[0], masks[0])
    later = zip(video[1:], masks[1:], strict=True)
    return statistics.mean(palette_distance(subject_palette(f, m), first) for f, m in later)


def stored_bytes(point: Point, subject: Subject, _: Ranks) -> float:
    found = point.record(subject)
    assert found is not None, f"{point.id}, subject {subject.index}: another process has not finished it"
    return float(found["bytes"])


def mean(scores: Scores) -> float:
    return statistics.mean(value for row in scores.values() for value in row.values())


if __name__ == "__main__":
    main(tyro.cli(SignatureArguments, description=__doc__))
