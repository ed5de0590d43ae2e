"""Score a run's videos, or any folder of videos with a CSV file: the same metrics for every method.

    dit-booth evaluate runs/RUN --weights dino=dino_deitsmall16_pretrain.pth
    dit-booth evaluate mine/videos.csv --metrics palette motion clip --weights clip=ViT-B-32.pt
    dit-booth report mine runs/RUN

The CSV file has the columns video, image, caption, subject, and may have prompt, noise_seed, control, truth, identity.
Scores go into scores.jsonl beside it; without --metrics, those that it has already are left as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from dit_booth.commands.program import run_program
from dit_booth.commands.report import ReportArguments, write_report
from dit_booth.errors import suggest
from dit_booth.evaluation import learned, score, summary
from dit_booth.evaluation.case import Scorer
from dit_booth.evaluation.catalogue import describe
from dit_booth.evaluation.folder import LEFT_OUT, VideoFolder, find_list
from dit_booth.evaluation.learned import Family
from dit_booth.evaluation.learned.sets import SetScorer
from dit_booth.evaluation.motion import flicker_scores, flow_scorer, motion_scores
from dit_booth.evaluation.oracle import ORACLE, oracle_scores
from dit_booth.evaluation.palette import palette_scores
from dit_booth.evaluation.pixels import psnr_scores
from dit_booth.evaluation.scores import SCORES, Score, read_scores, write_scores
from dit_booth.files import write_text
from dit_booth.sampling.scorers import judge_scorer

TOYWORLD: dict[str, Family[Scorer]] = {
    "oracle": Family(lambda weights, device: oracle_scores, ORACLE),
    "flicker": Family(lambda weights, device: flicker_scores, ("flicker",)),
    "palette": Family(lambda weights, device: palette_scores, ("palette", "subject_found")),
    "judges": Family(lambda weights, device: judge_scorer(torch.device(device)), ("judge_i", "judge_t")),
}
"""Metrics of videos with an identity."""
PIXELS: dict[str, Family[Scorer]] = {
    "motion": Family(lambda weights, device: motion_scores, ("speed", "growth", "rotation", "flicker")),
    "flow": Family(lambda weights, device: flow_scorer(), ("flow", "dynamic_degree")),
    "psnr": Family(lambda weights, device: psnr_scores, ("psnr",)),
}
FAMILIES: dict[str, Family[Scorer]] = {**TOYWORLD, **PIXELS, **learned.SCORERS}


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    videos: Annotated[str, tyro.conf.Positional]
    """A run's folder, a folder with videos.csv, or such a CSV file."""
    metrics: tuple[str, ...] = ()
    """Groups of metrics: oracle, palette, judges (toy world), motion, psnr, and those of networks, such as clip, dino,
    lite0, vbench, lpips, fvd; empty: all that can be computed here."""
    weights: tuple[str, ...] = ()
    """Weights of networks, as NETWORK=FILE or NETWORK=hf-hub:OWNER/NAME."""
    device: str = ""
    """Device of the networks; empty: a GPU if there is one."""
    page: bool = True
    """Write report.html and report.csv beside the scores."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: scored; 1: an error, said in one line."""
    return run_program(EvaluateArguments, evaluate, argv, prog=prog, description=__doc__)


def evaluate(arguments: EvaluateArguments) -> Iterator[str]:
    """Score the videos, write the files, and iterate over lines that say what was found.

    ValueError: no such videos, a metric that cannot be computed here, or no video that can be read.
    """
    file = find_list(Path(arguments.videos))
    videos, folder = VideoFolder(file), file.parent
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    known = read_scores(folder / SCORES) if (folder / SCORES).is_file() else []
    chosen = Chosen.build(arguments, device, videos, {one.metric for one in known})
    result = score_videos(videos, chosen)
    new = {(one.metric, one.prompt, one.noise_seed, one.control) for one in result.scores}
    kept = [one for one in known if (one.metric, one.prompt, one.noise_seed, one.control) not in new]
    seed = known[0].seed if known else 0
    write_scores(folder / SCORES, [*kept, *(replace(one, seed=seed) for one in result.scores)])
    write_text(folder / LEFT_OUT, json.dumps(result.left_out, indent=1) + "\n")
    yield from table([*kept, *result.scores])
    yield from (f"left out: {reason}" for reason in result.left_out.values())
    yield from (f"not measured for all: {name}: {why}" for name, why in result.failed.items())
    if chosen.absent:
        yield f"without their weights or package: {', '.join(chosen.absent)}; --metrics NAME tells what one needs"
    yield f"{folder / SCORES}"
    if arguments.page:
        yield from write_report(
            ReportArguments(folders=(str(folder),), out=str(folder / "report.html"), csv=True)
        )


@dataclass(frozen=True)
class Chosen:
    """Scorers of one video and of a set of videos by group, and why others cannot be computed here."""

    scorers: dict[str, Scorer]
    sets: dict[str, SetScorer]
    absent: dict[str, str]

    @classmethod
    def build(
        cls, arguments: EvaluateArguments, device: torch.device, videos: VideoFolder, known: Collection[str]
    ) -> Chosen:
        """Build the named families; without names, all that can be and are not `known` yet.

        ValueError: an unknown name, or a named family that cannot be built here.
        """
        weights, every = parse_weights(arguments.weights), [*FAMILIES, *learned.SET_SCORERS]
        for name in arguments.metrics:
            if name not in every:
                raise ValueError(f"--metrics names {name!r}{suggest(name, every)}")
        families: dict[str, Family[Scorer] | Family[SetScorer]] = {**FAMILIES, **learned.SET_SCORERS}
        networks = {family.weights for family in families.values()} - {""}
        for name in weights:
            if name not in networks | {"lite0"}:
                raise ValueError(f"--weights names {name!r}{suggest(name, networks)}")
        scorers, sets, absent = dict[str, Scorer](), dict[str, SetScorer](), dict[str, str]()
        for name in arguments.metrics or [n for n in every if is_default(n, families[n], videos, known)]:
            try:
                if name in FAMILIES:
                    scorers[name] = FAMILIES[name].build(weights, device)
                else:
                    sets[name] = learned.build_set(name, weights, device)
            except ValueError as error:
                if arguments.metrics:
                    raise
                absent[name] = str(error)
        return cls(scorers, sets, absent)


def is_default(
    name: str, family: Family[Scorer] | Family[SetScorer], videos: VideoFolder, known: Collection[str]
) -> bool:
    """Return True for a family to compute without being asked: it fits the data, and its scores are not there yet."""
    toyworld = any(row.identity for row in videos.rows)
    fits = (
        toyworld if name in TOYWORLD else not (name == "motion" and toyworld)
    )  # the oracle tracks the exact pose
    return fits and not set(family.metrics) <= set(known)


@dataclass(frozen=True)
class Result:
    """Scores of a folder, the reason for each video that cannot be read, and for each family that failed on some."""

    scores: list[Score] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def score_videos(videos: VideoFolder, chosen: Chosen) -> Result:
    """Score all videos, and the real video of each prompt as control ``truth``. ValueError: none can be read."""
    result = Result()
    truths = {row.prompt for row in videos.rows if row.control == "truth"}
    for index, row in enumerate(tqdm(videos.rows, desc="videos", unit="video")):
        try:
            case = videos[index]
        except ValueError as error:
            result.left_out[row.video] = str(error)
            continue
        cases = [case]
        if case.truth is not None and case.prompt not in truths:
            truths.add(case.prompt)
            cases.append(case.as_truth())
        for name, scorer in chosen.scorers.items():
            try:
                result.scores.extend(found for one in cases for found in score(one, [scorer]))
            except ValueError as error:
                result.failed.setdefault(name, f"{row.video}: {error}")
    if len(result.left_out) == len(videos):
        first = next(iter(result.left_out.values()))
        raise ValueError(f"none of {len(videos)} videos can be read; the first: {first}")
    for control in dict.fromkeys(row.control for row in videos.rows if row.control != "truth"):
        of_control = [i for i, row in enumerate(videos.rows) if row.control == control]
        rows = [i for i in of_control if videos.rows[i].video not in result.left_out]
        for name, set_scorer in chosen.sets.items():
            try:
                values = set_scorer(videos.only(rows))
            except ValueError as error:  # too few videos, or no real ones
                result.failed.setdefault(name, str(error))
                continue
            result.scores.extend(Score(metric=m, value=v, control=control) for m, v in values.items())
    return result


def table(scores: Sequence[Score]) -> Iterator[str]:
    """Format means over prompts, a line for each metric: the videos, the floors, the ground truth."""
    controls = dict.fromkeys(one.control for one in scores)
    means = {control: summary(scores, control) for control in controls}
    yield f"{'':28}" + "".join(f"{control or 'videos':>22}" for control in controls)
    for name in dict.fromkeys(one.metric for one in scores):
        metric = describe(name)
        cells = []
        for control in controls:
            value = means[control].get(name)
            text = "" if value is None else f"{value.mean:.{metric.digits}f}"
            text += (
                "" if value is None or math.isnan(value.stderr) else f" +- {value.stderr:.{metric.digits}f}"
            )
            cells.append(f"{text:>22}")
        yield f"{f'{metric.label} {metric.unit}'.strip():28}" + "".join(cells)
    yield "mean +- standard error over prompts"


def parse_weights(assignments: Sequence[str]) -> dict[str, str]:
    """Turn ``dino=FILE`` and the like into a mapping. ValueError: a word without ``=``."""
    for assignment in assignments:
        if "=" not in assignment:
            raise ValueError(f"--weights has {assignment!r}; write NETWORK=FILE, such as dino=dino.pth")
    return dict(assignment.split("=", 1) for assignment in assignments)
