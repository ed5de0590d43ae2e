"""Does a base of the toy world do what the caption says: does the subject go there, and has it that shape? Text alone.

    python -m experiments.bench.captions                          # the package's base
    python -m experiments.bench.captions --weights runs/base-dit

Held-out captions that name a direction, in equal numbers; a video counts where the subject's centre (left, right, up,
down) or its area (growing, shrinking) moves the caption's way from the first frame to the last. Of the toy world's own
videos all do. A base that does not hear the direction gets half of them right, or fewer where it takes another axis.

`shape` is the overlap of the segmented subject with the best-fitting pose of the caption's shape, `shapes_right` counts
the videos in whose middle frame no other shape overlaps more. `truth` is the same of the toy world's own videos.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import count

import torch
import tyro
from torch import Tensor

from dit_booth.cli import parse
from dit_booth.data.example import Example
from dit_booth.evaluation.segment import subject_mask
from dit_booth.evaluation.shape import best_shape, video_shape_overlap
from dit_booth.sampling import generate
from dit_booth.training.build import build

WAYS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")


@dataclass(frozen=True, kw_only=True)
class Settings:
    weights: str = "embedded"
    """As run.py's: the package's base, a run folder, or a .safetensors file."""
    config: str = "experiments/configs/toyworld_base.yaml"
    """The base's configuration."""
    each: int = 8
    """Videos of each of the six ways."""
    batch: int = 12
    """Videos sampled at once."""


def main(settings: Settings) -> None:
    weights = f"--weights={settings.weights}"
    parts = build(parse(["--config", settings.config, "--data.describe=full", weights]))
    parts = parts.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = next(parts.root.parameters()).device
    frames, side = parts.config.data.frames, parts.config.data.size
    world, named = parts.dataset(heldout=True), {way: list[Example]() for way in WAYS}
    for i in count():
        example = world[i]
        way = next((way for way in WAYS if f" {way} " in example.caption), None)
        if way and len(named[way]) < settings.each:
            named[way].append(example)
        if all(len(examples) == settings.each for examples in named.values()):
            break
    asked = [(way, example) for way, examples in named.items() for example in examples]
    right = dict.fromkeys(WAYS, 0)
    made, truth = list[Shape](), [shape_of(example.video, example.subject) for _, example in asked]
    for at in range(0, len(asked), settings.batch):
        rows = asked[at : at + settings.batch]
        videos = generate(
            parts,
            torch.stack([example.image for _, example in rows]).to(device),
            [example.caption for _, example in rows],
            [None] * len(rows),
            range(at, at + len(rows)),
            size=(frames, side, side),
            use_image=False,
        )
        for (way, example), video in zip(rows, videos.float().cpu(), strict=True):
            right[way] += follows(way, video)
            made.append(shape_of(video, example.subject))
    row = {"weights": settings.weights, "videos": len(asked), "right": sum(right.values()), **right}
    print(json.dumps(row | summary_of(made) | {"truth": summary_of(truth)}))


@dataclass(frozen=True)
class Shape:
    """A video's overlap with the shape that it should have, and whether no other one fits its middle frame better."""

    overlap: float
    right: bool


def shape_of(video: Tensor, shape: str) -> Shape:
    """How well a video (f 3 h w in [-1, 1]) keeps to a shape; where its middle frame is empty, no shape is right."""
    middle = subject_mask(video[len(video) // 2])
    return Shape(video_shape_overlap(video, shape), bool(middle.any()) and best_shape(middle) == shape)


def summary_of(shapes: list[Shape]) -> dict[str, float]:
    """The mean overlap and the number of right shapes."""
    return {
        "shape": round(sum(shape.overlap for shape in shapes) / len(shapes), 3),
        "shapes_right": sum(shape.right for shape in shapes),
    }


def follows(way: str, video: Tensor) -> bool:
    """Whether the subject of a video (f 3 h w in [-1, 1]) moves that way; not where it is not to be seen."""
    first, last = (subject_mask(frame).nonzero().float() for frame in (video[0], video[-1]))  # n 2
    if not len(first) or not len(last):
        return False
    down, right = (last.mean(0) - first.mean(0)).tolist()
    larger = math.log(len(last) / len(first))
    moves = {
        "left": -right,
        "right": right,
        "up": -down,
        "down": down,
        "growing": larger,
        "shrinking": -larger,
    }
    return moves[way.split()[-1]] > 0


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
