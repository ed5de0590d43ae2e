"""Does a base of the toy world do what the caption says: does the subject go there, and has it that shape? Text alone.

    python -m experiments.bench.captions                          # the package's base
    python -m experiments.bench.captions --weights runs/base-dit

Held-out captions that name a direction, in equal numbers; a video counts where the subject's centre (left, right, up,
down) or its area (growing, shrinking) moves the caption's way from the first frame to the last. Of the toy world's own
videos all do. A base that does not hear the direction gets half of them right, or fewer where it takes another axis.

`shape` is the overlap of the segmented subject with the best-fitting pose of the caption's shape, `shapes_right` counts
the videos in whose middle frame no other shape overlaps more. `spinning` has both for spinning subjects, which are
hardest: only there does a shape stand at every angle. `truth` is the same of the toy world's own videos.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
import tyro
from torch import Tensor

from dit_booth.components import Components, build
from dit_booth.config.parse import parse
from dit_booth.data.example import Example
from dit_booth.evaluation.oracle import best_shapes, shape_overlaps
from dit_booth.evaluation.segment import subject_mask
from dit_booth.sampling.generate import generate

WAYS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
SPINNING = "spinning"


@dataclass(frozen=True, kw_only=True)
class CaptionsArguments:
    weights: str = "embedded"
    """As run.py's: the package's base, a run folder, or a .safetensors file."""
    config: str = "experiments/configs/toyworld_base.yaml"
    """The base's configuration."""
    each: int = 8
    """Videos of each of the six ways."""
    spinning: int = 24
    """Videos of spinning subjects."""
    batch: int = 12
    """Videos sampled at once."""


def main(settings: CaptionsArguments) -> None:
    weights = f"--weights={settings.weights}"
    components = build(parse(["--config", settings.config, "--data.toyworld.describe=full", weights]))
    components = components.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    asked = ask(components, dict.fromkeys(WAYS, settings.each) | {SPINNING: settings.spinning})
    right, made = dict.fromkeys(WAYS, 0), list[Shape]()
    for video, (motion, example) in zip(sampled(components, asked, settings.batch), asked, strict=True):
        if motion in right:
            right[motion] += follows(motion, video)
        made.append(shape_of(video, example.subject))
    truth = [shape_of(example.video, example.subject) for _, example in asked]
    directed = len(asked) - settings.spinning
    found, true = (
        {**summary_of(shapes[:directed]), SPINNING: summary_of(shapes[directed:])} for shapes in (made, truth)
    )
    row = {"weights": settings.weights, "videos": directed, "right": sum(right.values()), **right}
    print(json.dumps({**row, **found, "truth": true}))


def ask(components: Components, wanted: dict[str, int]) -> list[tuple[str, Example]]:
    """Return the first held-out examples of each motion, as many as `wanted`, in the order of the motions."""
    world, named = components.dataset("dev"), {motion: list[Example]() for motion in wanted}
    for i in count():
        example = world[i]
        motion = next((motion for motion in wanted if f" {motion} " in example.caption), None)
        if motion and len(named[motion]) < wanted[motion]:
            named[motion].append(example)
        if all(len(examples) == wanted[motion] for motion, examples in named.items()):
            return [(motion, example) for motion, examples in named.items() for example in examples]
    raise AssertionError("the counter has no end")


def sampled(components: Components, asked: list[tuple[str, Example]], batch: int) -> Iterator[Tensor]:
    """A video (f 3 h w in [-1, 1], on the CPU) for each caption, from the text alone."""
    device, data = next(components.model.parameters()).device, components.config.data
    for at in range(0, len(asked), batch):
        rows = [example for _, example in asked[at : at + batch]]
        yield from (
            generate(
                components,
                torch.stack([example.image for example in rows]).to(device),
                [example.caption for example in rows],
                [None] * len(rows),
                range(at, at + len(rows)),
                size=(data.frames, *data.height_width),
                guidance=components.config.guidance,
                sampler=components.config.sampler,
                use_image=False,
            )
            .float()
            .cpu()
        )


@dataclass(frozen=True)
class Shape:
    """A video's overlap with the shape that it should have, and whether no other one fits its middle frame better."""

    overlap: float
    right: bool


def shape_of(video: Tensor, shape: str) -> Shape:
    """Score how well a video (f 3 h w in [-1, 1]) keeps to a shape; no shape is right if its middle frame is empty."""
    middle = len(video) // 2
    overlap = float(shape_overlaps(video, shape).mean())
    return Shape(overlap, best_shapes(video[middle : middle + 1]) == [shape])


def summary_of(shapes: list[Shape]) -> dict[str, float]:
    """The mean overlap and the number of right shapes."""
    return {
        "shape": round(sum(shape.overlap for shape in shapes) / len(shapes), 3),
        "shapes_right": sum(shape.right for shape in shapes),
    }


def follows(way: str, video: Tensor) -> bool:
    """Return True if the subject of a video (f 3 h w in [-1, 1]) is visible and moves that way."""
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
    return bool(moves[way.split()[-1]] > 0)


if __name__ == "__main__":
    main(tyro.cli(CaptionsArguments, description=__doc__))
