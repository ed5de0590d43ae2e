"""Drift of long videos, by the frames that the image reaches, by the frame plan, and by the way they are made.

    python -m experiments.bench.drift --out runs/drift                               # an hour of one core; resumes
    python -m experiments.bench.drift --out runs/drift --only first keyframes-8      # the primary contrast alone
    python -m experiments.bench.drift --out runs/drift --page docs/results/long.md   # the page of what is there

Each variant trains the embedded strategies for a short stage on crops of 16 frames, samples test prompts, and
is scored by the oracle. Finished pieces (a training, the scores of some prompts) are not made again.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import tyro
import yaml
from numpy.typing import NDArray

from dit_booth.commands.sample import nested
from dit_booth.config import PlainDict, RunConfig
from dit_booth.config.parse import merge
from dit_booth.data.video import read_video
from dit_booth.evaluation import score
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.oracle import oracle_scores
from dit_booth.evaluation.scores import write_scores
from dit_booth.files import write_text
from dit_booth.models.weights import ASSETS
from dit_booth.pipeline import EMBEDDED, Pipeline
from dit_booth.sampling.prompts import Request, requests_of, sample_prompts
from dit_booth.sampling.video import Video
from dit_booth.training.distributed import Ranks
from experiments.bench.drift_page import METRIC, PICTURES, PRIMARY, TRUTH, Results, read_results, write_page
from experiments.bench.drift_pictures import draw_frames, draw_sheet

log = logging.getLogger("dit_booth")
ALONE = Ranks(0, 1, torch.device("cpu"))
SHOWN = (0, 1)
"""Prompts on the sheet."""


@dataclass(frozen=True)
class Variant:
    """A row of the study: settings of its fine stage, and of its sampling."""

    training: PlainDict
    sampling: PlainDict = field(default_factory=dict)
    weights_of: str = ""
    """The variant that it has the weights of; empty: it is trained."""


def anchored(plan: str, keyframe_every: int = 0) -> PlainDict:
    """Return the settings of a plan, with the image at frame 0 or at every keyframe."""
    at = {"reference_at": "keyframes", "keyframe_every": keyframe_every} if keyframe_every else {}
    return {"dit": {"plan": plan}, "kv_concat": {"reference_at": "first", **at}}


def way(kind: str, **options: object) -> PlainDict:
    return {"sample": {"long": {"kind": kind, **options}}}


KEYFRAMES = anchored("self+keyframes(8)", 8)
VARIANTS = {
    "first": Variant(anchored("self+first+previous")),
    "keyframes-8": Variant(KEYFRAMES),
    "keyframes-4": Variant(anchored("self+keyframes(4)", 4)),
    "keyframes-16": Variant(anchored("self+keyframes(16)", 16)),
    "window": Variant(anchored("window(8)")),
    "sink+window": Variant(anchored("sink(1)+window(8)")),
    "diffusion_forcing": Variant({**KEYFRAMES, "objective": {"per_frame": True}}, way("diffusion_forcing")),
    "freenoise": Variant(KEYFRAMES, way("freenoise"), "keyframes-8"),
    "whole": Variant(KEYFRAMES, way("none"), "keyframes-8"),
    "riflex": Variant(KEYFRAMES, way("none", riflex=16), "keyframes-8"),
}


@dataclass(frozen=True)
class DriftArguments:
    out: Path
    """Folder of the trainings, the videos and their scores; with --page also a file of scores."""
    only: tuple[str, ...] = (TRUTH, *VARIANTS)
    """Variants to make; truth: the prompts' real videos."""
    seeds: int = 5
    """Training seeds of the primary contrast; the other variants have the first one."""
    prompts: int = 24
    """Test prompts of the primary contrast."""
    fewer: int = 4
    """Test prompts of the other variants."""
    piece: int = 4
    """Prompts that are sampled and scored at once."""
    set: tuple[str, ...] = ()
    """Settings of all runs, over experiments/configs/long.yaml, such as stages.fine.steps=100."""
    page: Path | None = None
    """Write this page of what is there, and make nothing."""

    @property
    def pieces(self) -> list[Piece]:
        """All pieces in order: those of the primary contrast seed by seed, then the others."""
        wanted = [Piece(name, seed, self.prompts) for seed in range(self.seeds) for name in PRIMARY]
        wanted.insert(0, Piece(TRUTH, 0, self.prompts))
        wanted += [Piece(name, 0, self.fewer) for name in VARIANTS if name not in PRIMARY]
        return [piece for piece in wanted if piece.name in self.only]


@dataclass(frozen=True)
class Piece:
    """A training of a variant, and the number of prompts that it is to be scored on."""

    name: str
    seed: int
    prompts: int


@dataclass(frozen=True)
class Study:
    """The study's folder, and the settings of all its runs."""

    out: Path
    settings: PlainDict
    step: int
    """Prompts that are sampled and scored at once."""

    def make(self, piece: Piece) -> None:
        """Train, sample and score what a piece still lacks."""
        steps = [range(at, min(at + self.step, piece.prompts)) for at in range(0, piece.prompts, self.step)]
        files = {
            self.out / f"{piece.name}-seed{piece.seed}" / "scores" / f"{s.start:03}.jsonl": s for s in steps
        }
        missing = {file: prompts for file, prompts in files.items() if not file.is_file()}
        if not missing:
            return
        pipeline, requests = self.requests_of(piece)
        for file, prompts in missing.items():
            started = time.process_time()
            if pipeline is None:
                cases = [case_of(requests[i]) for i in prompts]
            else:
                folder = self.out / f"{piece.name}-seed{piece.seed}" / "samples"
                sample = pipeline.config.sample
                cases = list(sample_prompts(pipeline, sample, requests, folder, ALONE, prompts).values())
            sampled = time.process_time()
            write_scores(
                file, [one for case in cases for one in score(case, [oracle_scores], seed=piece.seed)]
            )
            seconds = {"sampled": sampled - started, "scored": time.process_time() - sampled}
            log.info("%s seed %d, prompts %s: %s", piece.name, piece.seed, list(prompts), json.dumps(seconds))

    def requests_of(self, piece: Piece) -> tuple[Pipeline | None, list[Request]]:
        """Return the network of a piece, trained if need be, and its prompts; no network: the real videos are meant."""
        if piece.name == TRUTH:
            return None, real_videos(piece.prompts, self.settings)
        variant = VARIANTS[piece.name]
        sample: PlainDict = {"sample": {"videos": piece.prompts, "batch_size": self.step}}
        folder = self.trained(variant.weights_of or piece.name, piece.seed)
        pipeline = Pipeline.load(folder, settings=merge(sample, variant.sampling), device="cpu")
        return pipeline, requests_of(pipeline, pipeline.config.sample)

    def trained(self, name: str, seed: int) -> Path:
        """Train a variant's stage from the embedded pipeline; return the run's folder."""
        start: PlainDict = {"strategy_weights": [str(ASSETS / EMBEDDED["toyworld"])], "train": {"seed": seed}}
        return self.run(f"{name}-seed{seed}", VARIANTS[name].training, start)

    def run(self, name: str, *settings: PlainDict) -> Path:
        """Train a run to its end, unless it is there; sample nothing. Return its folder.

        ValueError: the folder has a run of other settings.
        """
        folder, file = self.out / name / "run", self.out / name / "settings.yaml"
        own: PlainDict = {"extends": "long", "out": str(folder), "sample": {"videos": 0}}
        text = yaml.safe_dump(reduce(merge, settings, merge(self.settings, own)))
        if file.is_file() and file.read_text() != text:
            raise ValueError(
                f"{file} has other settings; choose another --out, or the --set that it was made with"
            )
        if not (folder / "finished").is_file():
            write_text(file, text)
            # in a process of its own, which gives its memory back
            subprocess.run([sys.executable, "-m", "dit_booth", "run", "--config", str(file)], check=True)
        return folder


def real_videos(count: int, settings: PlainDict) -> list[Request]:
    """Return the first test prompts, with their real videos."""
    config = RunConfig.create("long", **settings)
    split = config.data.build(config.sample.split)
    return [Request.of(split[i]) for i in range(count)]


def case_of(request: Request) -> Case:
    """Return the real video of a prompt as a case."""
    assert request.truth is not None, "the toy world has the real videos"
    return Case(
        video=request.truth,
        image=request.image,
        caption=request.caption,
        subject=request.subject,
        prompt=request.prompt,
        identity=request.identity,
    )


def draw_pictures(options: DriftArguments, results: Results) -> None:
    """Draw the plot beside the page, and, of a study's folder, the sheet of two prompts."""
    assert options.page is not None
    frames, sheet = (options.page.with_name(name.format(options.page.stem)) for name in PICTURES)
    draw_frames(results, (TRUTH, *PRIMARY), METRIC, frames)
    if options.out.is_dir():
        requests = real_videos(max(SHOWN) + 1, nested(options.set))
        draw_sheet([videos_of(options.out, requests[i], i, results) for i in SHOWN], sheet)


def videos_of(folder: Path, request: Request, index: int, results: Results) -> dict[str, NDArray[np.uint8]]:
    """Return the videos of a prompt (f h w 3): the real one, and each variant's of the first seed."""
    assert request.truth is not None
    videos = {TRUTH: Video.from_tensor(request.truth, fps=8).frames}
    for name in results:
        file = folder / f"{name}-seed0" / "samples" / f"{index:03d}-seed0.mp4"
        if file.is_file():
            videos[name] = read_video(file)
    return videos


def main(options: DriftArguments) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    unknown = [name for name in options.only if name not in (TRUTH, *VARIANTS)]
    if unknown:
        raise ValueError(f"--only names {unknown[0]!r}; choose from {', '.join((TRUTH, *VARIANTS))}")
    if options.page is not None:
        results = read_results(options.out, [TRUTH, *VARIANTS])
        if results:
            draw_pictures(options, results)
        write_page(options.page, results)
        return
    study = Study(options.out, nested(options.set), options.piece)
    for piece in options.pieces:
        study.make(piece)


if __name__ == "__main__":
    main(tyro.cli(DriftArguments, description=__doc__))
