"""Sample videos from a finished run or the embedded pipeline: for prompts of its data, or an image of your own.

    dit-booth sample runs/RUN --references own shuffled none --seeds 0 1 2
    dit-booth sample toyworld --split test --videos 82
    dit-booth sample runs/RUN --image path/to/image_or_folder --caption "a panda is running" --subject panda
    dit-booth sample toyworld --image star.png --caption "a star is spinning on snow" --subject star
    dit-booth sample toyworld --image star.png --caption "a star is spinning" --subject star --frames 256 --long chunks
    dit-booth sample runs/RUN --split test --videos 24 --frames 128 --long chunks
    dit-booth sample runs/RUN --image a.png b.png --caption "a cat and a dog run" --subject cat

Videos for prompts of the data are measured; of your own image there are a video and a contact sheet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_booth.commands.program import run_program
from dit_booth.config import SampleReference
from dit_booth.config.long import LongKind
from dit_booth.config.parse import merge
from dit_booth.errors import check_number
from dit_booth.pipeline import Pipeline
from dit_booth.sampling.measure import measure
from dit_booth.sampling.prompts import requests_of, sample_prompts
from dit_booth.sampling.video import Video
from dit_booth.training.distributed import Ranks, start, stop


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    run: Annotated[str, tyro.conf.Positional]
    """The folder of a finished run, an adapter's file (.safetensors), or toyworld, toyworld-unet (embedded)."""
    references: tuple[SampleReference, ...] = ("own",)
    """Image prompts that the videos get: their own, the next prompt's (shuffled), none."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the sampling noise: each prompt gets a video of every seed."""
    split: Literal["dev", "test"] = "dev"
    """Prompts: dev, which settings are chosen on, or test, for published numbers."""
    videos: int = 0
    """Prompts; 0: as many as the run sampled."""
    image: tuple[str, ...] = ()
    """An image, or a folder with image.jpg and a mask, to sample from instead of the data's; several, if the run has
    data.image_prompts."""
    mask: tuple[str, ...] = ()
    """The mask of each image's subject; without one, and without transparency, the whole image is taken."""
    caption: str = ""
    """The text for --image."""
    subject: str = ""
    """The words of the caption that the image stands for."""
    frames: int = 0
    """Frames of each video; 0: as the run's. The video of --image is written while it is made; Ctrl-C and the same
    command resumes."""
    long: LongKind | Literal[""] = ""
    """How videos with more frames than the training's are made (sample.long.kind); empty: as the run has it."""
    interpolator: str = ""
    """Long videos by lvdm: the run whose network interpolates between the frames that this one predicts; empty: this
    one does."""
    out: str = ""
    """Folder of the videos; empty: in the run's folder, or runs/samples-<name>."""
    set: tuple[str, ...] = ()
    """Settings of the run to replace for sampling, such as guidance.image=3 decoupled_attention.scale=0.5."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: sampled; 1: an error, said in one line."""
    return run_program(SampleArguments, sample, argv, prog=prog, description=__doc__)


def sample(arguments: SampleArguments) -> Iterator[str]:
    """Sample the prompts, or an image of the user's own; iterate over lines that tell where the videos are.

    ValueError: no such run, a flag that has no effect, or --image has no caption with its subject.
    """
    if (arguments.caption or arguments.subject or arguments.mask) and not arguments.image:
        raise ValueError("--image is missing; --caption, --subject and --mask are for an image of your own")
    check_number("--frames", arguments.frames, "[0, 10000]")
    pipeline = load(arguments)
    if arguments.image:
        for seed in arguments.seeds:
            yield str(sample_image(pipeline, arguments, seed))
        return
    ranks = start()
    try:
        yield json.dumps(sample_set(pipeline, arguments, ranks))
    finally:
        stop()


def load(arguments: SampleArguments) -> Pipeline:
    """Load the run, and the one that interpolates. ValueError: nothing would be interpolated."""
    own = {"sample": {"long": {"kind": arguments.long}}} if arguments.long else {}
    pipeline = Pipeline.load(arguments.run, settings=merge(nested(arguments.set), own))
    if arguments.interpolator:
        long = pipeline.config.sample.long
        if long.kind != "lvdm" or not long.interpolated:
            raise ValueError(
                f"--interpolator is {arguments.interpolator}, but sample.long.kind is {long.kind} and"
                f" sample.long.interpolated {long.interpolated}; give --long lvdm --set sample.long.interpolated=5"
            )
        pipeline.interpolator = Pipeline.load(arguments.interpolator)
    return pipeline


def variant_of(arguments: SampleArguments) -> list[str]:
    """Return the options that a file's or folder's name tells: those of which videos in one folder may differ."""
    return [
        *([f"{arguments.frames}frames"] if arguments.frames else []),
        *arguments.set,
        *([f"sample.long.kind={arguments.long}"] if arguments.long else []),
        *([f"interpolator={Path(arguments.interpolator).stem}"] if arguments.interpolator else []),
    ]


def nested(assignments: Sequence[str]) -> dict[str, object]:
    """Turn ``guidance.image=3`` and the like into nested settings. ValueError: a word without ``=``."""
    out: dict[str, object] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set has {assignment!r}; write NAME=VALUE, such as guidance.image=3")
        setting: object = value
        for part in reversed(name.replace("-", "_").split(".")):
            setting = {part: setting}
        assert isinstance(setting, dict)
        out = merge(out, setting)
    return out


def folder_of(arguments: SampleArguments) -> Path:
    if arguments.out:
        return Path(arguments.out)
    run = Path(arguments.run)
    return run if run.is_dir() else Path("runs") / f"samples-{run.stem}"


def sample_image(pipeline: Pipeline, arguments: SampleArguments, seed: int) -> Path:
    """Sample one video of a user's image and caption; return its path. A contact sheet is written beside it."""
    image = None if arguments.references == ("none",) else arguments.image
    mask = None if image is None else arguments.mask or None
    names = [Path(path).stem for path in arguments.image]
    name = "-".join([*names, f"seed{seed}", *variant_of(arguments)])
    path = pipeline.write(
        folder_of(arguments) / "samples-own-image" / f"{name}.mp4",
        image,
        arguments.caption,
        subject=arguments.subject or None,
        mask=mask,
        seed=seed,
        frames=arguments.frames or None,
    )
    shown = None if image is None else pipeline.image_prompts(image, mask)[0]
    stride = max(1, arguments.frames // 64)
    Video.read(path, text=arguments.caption, image=shown, stride=stride).save(path.with_suffix(".png"))
    return path


def sample_set(pipeline: Pipeline, arguments: SampleArguments, ranks: Ranks) -> dict[str, object]:
    """Sample and measure prompts of the data; return the means by control, and where the files are."""
    sample = replace(
        pipeline.config.sample,
        seeds=arguments.seeds,
        references=arguments.references,
        split=arguments.split,
        videos=arguments.videos or pipeline.config.sample.videos,
    )
    seeds = "-".join(map(str, sample.seeds))
    name = "-".join(["samples", sample.split, *sample.references, f"seed{seeds}", *variant_of(arguments)])
    out = folder_of(arguments) / name
    requests = requests_of(pipeline, sample, arguments.frames)
    cases = sample_prompts(pipeline, sample, requests, out, ranks)
    means = measure(pipeline, cases, out)
    return {"folder": str(out), "means": {control or "own": own for control, own in means.items()}}
