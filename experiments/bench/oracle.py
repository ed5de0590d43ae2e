"""Do the oracle metrics find failures that are planted, and nothing else? A Markdown table of means over frames.

    python -m experiments.bench.oracle
    python -m experiments.bench.oracle --runs runs/demo/samples runs/samples-toyworld --speed

Each failure is rendered into the same dev examples, or applied to their real videos; its row says how many of
them it applies to (a plain subject has no texture to rotate). `mirrored` is none: an image prompt may be mirrored.
`--eye` compares `right_shape` with what a person saw in the frames of the first run: a line of JSON for each video,
with `video` (its name) and `right` (1 or 0 for each frame).
`--runs` adds folders of sampled toy-world videos (a run's `samples`, with its `videos.csv`).
"""

from __future__ import annotations

import colorsys
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from einops import repeat
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from dit_booth.data.example import Example
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.toyworld.looks import COLOUR_CONTRAST, COLOURS, Rgb
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES
from dit_booth.data.toyworld.world import (
    Identity,
    render_video,
)
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.catalogue import describe
from dit_booth.evaluation.folder import VideoFolder
from dit_booth.evaluation.oracle import best_shapes, oracle_scores
from dit_booth.evaluation.oracle.shape import overlap_bounds
from dit_booth.evaluation.palette import palette_scores
from dit_booth.evaluation.pixels import psnr

METRICS = (
    *("appearance", "right_shape", "shape", "right_texture", "palette", "subject_found", "psnr"),
    *("speed", "growth", "rotation"),
)


@dataclass(frozen=True, kw_only=True)
class OracleArguments:
    examples: int = 48
    """Dev examples that the failures are planted in."""
    frames: int = 8
    """Frames of each video."""
    size: int = 32
    """Side of the videos in pixels."""
    runs: tuple[str, ...] = ()
    """Folders of sampled videos, such as runs/demo/samples."""
    eye: str = ""
    """A .jsonl file of a person's judgement of the first run's frames."""
    speed: bool = False
    """Measure the speed on 12 videos as well."""


def main(settings: OracleArguments) -> None:
    torch.set_num_threads(1)
    config = ToyworldConfig(frames=settings.frames, size=settings.size, split="dev")
    world = Toyworld(config)
    examples = [world[i] for i in range(settings.examples)]
    print("| video | n | " + " | ".join(_heading(name) for name in METRICS) + " |")
    print("|---|---:|" + "---:|" * len(METRICS))
    for name, plant in FAILURES.items():
        planted = [(plant(example), example) for example in examples]
        print(_row(name, [_case(video, example) for video, example in planted if video is not None]))
    others = [*examples[1:], examples[0]]
    print(_row("another example's", [_case(b.video, a) for a, b in zip(examples, others, strict=True)]))
    for folder in settings.runs:
        print(_row(f"`{Path(folder).name}`", list(read_run(Path(folder)))))
    if settings.eye:
        _compare(Path(settings.eye), Path(settings.runs[0]))
    if settings.speed:
        _measure_speed([_case(example.video, example) for example in examples[:12]])


def score(case: Case) -> dict[str, float]:
    """Return a video's mean of every metric over the frames that have one."""
    frames = {**oracle_scores(case), **palette_scores(case)}
    assert case.truth is not None
    means = {name: float(np.nanmean(each)) for name, each in frames.items() if not np.isnan(each).all()}
    return means | {"psnr": psnr(case.video, case.truth)}


def read_run(folder: Path) -> Iterator[Case]:
    """Read a run's own sampled videos, of the toy world. ValueError: there is no videos.csv, or no identity in it."""
    videos = VideoFolder(folder / "videos.csv")
    for index, row in enumerate(videos.rows):
        if not row.identity:
            raise ValueError(f"{folder}: {row.video} has no known identity; give samples of the toy world")
        if not row.control:
            yield videos[index]


def _heading(name: str) -> str:
    metric = describe(name)
    return f"{metric.label} ({metric.unit})" if metric.unit not in ("", "share") else metric.label


def _case(video: Tensor, example: Example) -> Case:
    return Case(
        video=video,
        image=example.image,
        caption=example.caption,
        truth=example.video,
        identity=example.identity,
    )


def _row(name: str, cases: Sequence[Case]) -> str:
    rows = [score(case) for case in cases]
    cells = [name, str(len(rows))]
    for metric in METRICS:
        known = [row[metric] for row in rows if metric in row]
        value = sum(known) / len(known) if known else math.nan
        cells.append("-" if math.isnan(value) else f"{value:.{describe(metric).digits}f}")
    return "| " + " | ".join(cells) + " |"


def _compare(eye: Path, folder: Path) -> None:
    """Print how many frames a person and `right_shape` judge alike, and list the others."""
    seen = [json.loads(line) for line in eye.read_text().splitlines()]
    alike, frames, apart = 0, 0, list[str]()
    for row, case in zip(seen, read_run(folder), strict=True):
        right, best = np.asarray(oracle_scores(case)["right_shape"]), best_shapes(case.video)
        for frame, (said, found, name) in enumerate(zip(row["right"], right, best, strict=True)):
            alike, frames = alike + (said == found), frames + 1
            if said != found:
                word = "right" if said else "wrong"
                apart.append(
                    f"- {row['video']}, frame {frame}: a {row['subject']}, {word} by eye; best fit: {name}"
                )
    print(f"\n{alike} of {frames} frames judged by eye as by right_shape\n")
    print("\n".join(apart))


def _measure_speed(cases: Sequence[Case]) -> None:
    """Print wall and processor time; other work on the machine lengthens the first."""
    count, runs = sum(len(case.video) for case in cases), (("first time", 1), ("again", 1), ("again", 2))
    overlap_bounds.cache_clear()
    print(f"\n| {len(cases)} videos, {count} frames | threads | s | frames/s | CPU s | frames/CPU s |")
    print("|---|---:|---:|---:|---:|---:|")
    for when, threads in runs:
        fresh = [replace(case) for case in cases]  # not segmented yet
        wall, processor = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda case: (oracle_scores(case), palette_scores(case)), fresh))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        cells = (f"{wall:.2f}", f"{count / wall:.0f}", f"{processor:.2f}", f"{count / processor:.0f}")
        print(f"| {when} | {threads} | " + " | ".join(cells) + " |")


def _changed(example: Example, **changes: object) -> Tensor:
    """Render an example with other parameters."""
    assert example.identity is not None
    identity = replace(Identity(**example.identity), **changes)  # type: ignore[arg-type]
    return render_video(identity, frames=len(example.video), size=example.video.shape[-1])[0]


def _identity(example: Example) -> Identity:
    assert example.identity is not None
    return Identity(**example.identity)


def _contrasting(rgb: Rgb) -> Rgb:
    return next(other for other in COLOURS.values() if math.dist(rgb, other) > 1.5 * COLOUR_CONTRAST)


def wrong_shape(example: Example) -> Tensor:
    """Draw the next shape of the list, in the same looks."""
    names = list(SHAPES)
    return _changed(example, shape=names[(names.index(example.subject) + 1) % len(names)])


def circle_for_square(example: Example) -> Tensor | None:
    """Draw a circle for a square and a square for a circle: the pair that overlaps most."""
    other = {"circle": "square", "square": "circle"}.get(example.subject)
    return _changed(example, shape=other) if other else None


def wrong_texture(example: Example) -> Tensor:
    """Draw the next texture of the list; a plain subject gets a second colour."""
    identity, names = _identity(example), list(TEXTURES)
    other = names[(names.index(identity.texture) + 1) % len(names)]
    first = identity.rgb[0]
    rgb = (first, _contrasting(first)) if identity.texture == "plain" else identity.rgb
    return _changed(example, texture=other, rgb=rgb)


def rotated_texture(example: Example) -> Tensor | None:
    """Turn the texture on the subject by 45 degrees."""
    identity = _identity(example)
    turned = identity.direction + math.radians(45)
    return None if identity.texture == "plain" else _changed(example, direction=turned)


def scaled_texture(example: Example) -> Tensor | None:
    """Draw stripes, dots or checks larger by 40%."""
    identity = _identity(example)
    patterns = ("striped", "dotted", "checkered")
    return _changed(example, scale=1.4 * identity.scale) if identity.texture in patterns else None


def swapped_colours(example: Example) -> Tensor | None:
    """Swap the two colours."""
    identity = _identity(example)
    return None if identity.texture == "plain" else _changed(example, rgb=identity.rgb[::-1])


def shifted_hue(example: Example) -> Tensor:
    """Turn the hue of both colours by 40 degrees."""
    shifted = []
    for rgb in _identity(example).rgb:
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        shifted.append(colorsys.hsv_to_rgb((hue + 40 / 360) % 1, saturation, value))
    return _changed(example, rgb=tuple(shifted))


def missing_subject(example: Example) -> Tensor:
    """Draw the background alone."""
    return _changed(example, start=(9.0, 9.0), end=(9.0, 9.0))


def noisy(example: Example, share: float) -> Tensor:
    """Add Gaussian noise; its standard deviation is a `share` of the range."""
    generator = torch.Generator().manual_seed(0)
    return (example.video + 2 * share * torch.randn(example.video.shape, generator=generator)).clamp(-1, 1)


def blurred(example: Example) -> Tensor:
    """Blur every frame: a Gaussian of 1.2 pixels at a side of 32."""
    sigma = 1.2 * example.video.shape[-1] / 32
    video: Tensor = gaussian_blur(example.video, 2 * math.ceil(2 * sigma) + 1, sigma)
    return video


def still(example: Example) -> Tensor:
    """Repeat the first frame."""
    return repeat(example.video[0], "c h w -> f c h w", f=len(example.video))


FAILURES: dict[str, Callable[[Example], Tensor | None]] = {
    "ground truth": lambda example: example.video,
    "mirrored (no failure)": lambda example: example.video.flip(-1),
    "wrong texture": wrong_texture,
    "texture turned by 45°": rotated_texture,
    "texture 40% larger": scaled_texture,
    "colours swapped": swapped_colours,
    "hue turned by 40°": shifted_hue,
    "wrong shape": wrong_shape,
    "circle for square or the reverse": circle_for_square,
    "missing subject": missing_subject,
    "noise, 5% of the range": lambda example: noisy(example, 0.05),
    "noise, 10% of the range": lambda example: noisy(example, 0.1),
    "blurred": blurred,
    "still": still,
}


if __name__ == "__main__":
    main(tyro.cli(OracleArguments, description=__doc__))
