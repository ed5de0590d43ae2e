"""All systems on real videos, and the per-subject ones on one picture: tiny budgets, to see that everything runs.

    python -m experiments.bench.compare_real --data real_triplets --image panda --word panda --out runs/real

`--data` is a folder in VideoBooth's format with four examples or more, `--image` a picture or a folder with one and its
mask. Writes the comparison's folder with its page, a run for each per-subject system, ``real.png``
(first and last frames of all videos), and ``own.png`` (the picture, and those of its videos).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_booth.commands.evaluate import EvaluateArguments, evaluate
from dit_booth.commands.personalise import PersonaliseArguments, per_subject_methods, personalise
from dit_booth.commands.report import ReportArguments, write_report
from dit_booth.comparison.compare import Comparison, compare
from dit_booth.comparison.work import Point
from dit_booth.evaluation.folder import VideoFolder

SETTINGS: Mapping[str, Any] = {
    "data": {"kind": "triplets", "frames": 4},
    "sampler": {"steps": 6},
    "subject": {"captions": ["a photo of {}"]},
}
"""Of all runs, beside the data's folder: four frames of 32 pixels, six sampling steps, the papers' text to tune on."""
PROMPTS = ("{} is eating a watermelon", "{} is surfing")
ENLARGED, LABEL, LINE = 2, 150, 12
"""Of the picture: pixels a pixel, width of the systems' names, and height of a line of text."""
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class RealArguments:
    data: Path
    """Folder of the real videos, in VideoBooth's format."""
    image: Path
    """One picture for the per-subject systems: a file, or a folder with image.jpg and a mask."""
    word: str
    """What the picture shows, in words."""
    out: Path = Path("runs/real")
    """Folder of everything that is made."""
    budget: str = "80GFLOP"
    """Budget of every system for one subject."""
    subjects: int = 4
    """Examples to compare on, which share the training of systems that are trained once."""
    steps: int = 20
    """Steps of each per-subject system on the picture."""
    methods: tuple[str, ...] = ()
    """Systems to compare; empty: all."""


def main(arguments: RealArguments) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    points = compare_systems(arguments)
    own = {method: personal(arguments, method, points) for method in per_subject_methods()}
    strips = {point.plan.system.name: strip_of(point) for point in points}
    write_picture(arguments.out / "real.png", {"image, real video": given_to(points[0]), **strips})
    write_picture(arguments.out / "own.png", own)


def compare_systems(arguments: RealArguments) -> list[Point]:
    """Compare the systems on the data's first examples, and write the page; return their points."""
    folder = arguments.out / "compare"
    triplets = {"root": str(arguments.data)}
    points = compare(
        Comparison(
            budget=arguments.budget,
            split="test",
            subjects=arguments.subjects,
            methods=arguments.methods,
            seeds=(0,),
            noise_seeds=(0,),
            amortise=arguments.subjects,
            folder=folder,
            settings={**SETTINGS, "data": {**SETTINGS["data"], "triplets": triplets}},
            command="python -m experiments.bench.compare_real",
        )
    )
    for point in points:  # colours of the subject, whose background is plain in videos that the base makes
        list(
            evaluate(EvaluateArguments(videos=str(point.place / "samples"), metrics=("palette",), page=False))
        )
    write_report(ReportArguments(folders=(str(folder),), csv=True))
    return points


def personal(arguments: RealArguments, method: str, points: list[Point]) -> Pixels:
    """Learn the picture by a per-subject system, or a real clip by one that tunes on videos; return a row of frames."""
    out, last = arguments.out / method, points[0].subjects[-1]
    image, word, video = str(arguments.image), arguments.word, ""
    if method == "tune_a_video":
        image, word, video = str(last.image), last.request.subject, last.video
    personalise(
        PersonaliseArguments(
            method=method,
            image=image,
            word=word,
            video=video,
            prompts=PROMPTS,
            steps=arguments.steps,
            out=str(out),
            set=("data.frames=4", "sampler.steps=6", "subject.captions=a photo of {}"),
        )
    )
    samples = VideoFolder(out / "samples" / "videos.csv")
    return np.concatenate(
        [pixels(samples[0].image[None])[0], *(ends(pixels(case.video)) for case in samples)], axis=1
    )


# ---- the picture -------------------------------------------------------------------------------------------


def strip_of(point: Point) -> Pixels:
    """Return the first and last frame of each of a system's videos, side by side (h w 3)."""
    cases = VideoFolder(point.place / "samples" / "videos.csv")
    return np.concatenate([ends(pixels(case.video)) for case in cases if not case.control], axis=1)


def given_to(point: Point) -> Pixels:
    """Return each subject's image prompt, and the first frame of its real video, side by side (h w 3)."""
    requests = [subject.request for subject in point.subjects]
    assert all(request.truth is not None for request in requests)
    pairs = [
        torch.stack([request.image, request.truth[0]]) for request in requests if request.truth is not None
    ]
    return np.concatenate([ends(pixels(pair)) for pair in pairs], axis=1)


def pixels(frames: Tensor) -> Pixels:
    """Return frames (f 3 h w in [-1, 1]) as pixels, f h w 3."""
    return rearrange((frames + 1) * 127.5, "f c h w -> f h w c").round().clamp(0, 255).byte().numpy()


def ends(frames: Pixels) -> Pixels:
    """Return the first and the last of some frames (f h w 3), side by side."""
    return np.concatenate([frames[0], frames[-1]], axis=1)


def write_picture(file: Path, strips: Mapping[str, Pixels]) -> None:
    """Write rows of frames (h w 3 each) below each other, each beside its name."""
    rows = [(name, enlarged(strip)) for name, strip in strips.items()]
    width, height = LABEL + max(strip.shape[1] for _, strip in rows), sum(len(strip) + 2 for _, strip in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for name, strip in rows:
        draw.text((4, top + (len(strip) - LINE) // 2), name, fill="black", font=ImageFont.load_default(LINE))
        sheet.paste(Image.fromarray(strip), (LABEL, top))
        top += len(strip) + 2
    sheet.save(file, optimize=True)


def enlarged(strip: Pixels) -> Pixels:
    return np.ascontiguousarray(repeat(strip, "h w c -> (h i) (w j) c", i=ENLARGED, j=ENLARGED))


if __name__ == "__main__":
    main(tyro.cli(RealArguments, description=__doc__))
