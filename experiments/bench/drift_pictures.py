"""Pictures of the study of drift: the metric frame by frame, and a sheet of every 16th frame."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dit_booth.evaluation.scores import Score

log = logging.getLogger("dit_booth")
Frames = NDArray[np.float64]
WINDOW = 16
"""Frames of the moving average, and distance of the frames on the sheet."""
CELL, GAP, LABEL, TEXT = 64, 2, 110, 14
"""Pixels of the sheet: a frame's side, the space between frames, the width of the labels, the height of a line."""


def by_frame(scores: Sequence[Score], metric: str) -> dict[int, Frames]:
    """Return seed -> the metric's mean over the prompts (f,), NaN in frames where none has a value."""
    rows: dict[int, list[Frames]] = {}
    for one in scores:
        if one.metric == metric:
            rows.setdefault(one.seed, []).append(np.asarray(one.value, dtype=np.float64))
    return {seed: moving_average(np.stack(found)) for seed, found in rows.items()}


def moving_average(values: Frames) -> Frames:
    """Average rows (n f) over the rows and over up to `WINDOW` frames around each one; NaN where none has one: f."""
    known = ~np.isnan(values)
    kernel = np.ones(WINDOW)
    total, count = (
        np.convolve(column, kernel, mode="same")
        for column in (np.where(known, values, 0).sum(0), known.sum(0).astype(np.float64))
    )
    average: Frames = np.divide(total, count, out=np.full(values.shape[1], math.nan), where=count > 0)
    return average


def draw_frames(
    results: Mapping[str, Sequence[Score]], primary: Sequence[str], metric: str, path: Path
) -> None:
    """Draw the metric over the frames: left the primary variants, with each seed, right all. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        log.warning("no plot: matplotlib is not installed; run `pip install -e .[bench]`")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    colours = dict(zip(results, plt.get_cmap("tab20")(range(len(results))), strict=True))
    common = set.intersection(*({one.prompt for one in scores} for scores in results.values()))
    for name, scores in results.items():
        seeds = by_frame(scores, metric)
        if name in primary:
            axes[0].plot(np.mean(list(seeds.values()), axis=0), color=colours[name], label=name)
            for values in seeds.values():
                axes[0].plot(values, color=colours[name], lw=0.5, alpha=0.6)
        first = by_frame([one for one in scores if one.seed == 0 and one.prompt in common], metric)
        axes[1].plot(first[0], color=colours[name], label=name)
    axes[0].set(title="all seeds and prompts", ylabel=f"{metric}, mean of {WINDOW} frames")
    axes[1].set(title=f"seed 0, the {len(common)} prompts that all have")
    for axis in axes:
        axis.set(xlabel="frame", ylim=(0, None))
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_sheet(prompts: Sequence[Mapping[str, NDArray[np.uint8]]], path: Path) -> None:
    """Draw a row for each video (f h w 3), prompt by prompt: every `WINDOW`-th frame, and the last one."""
    rows = [(name, video) for videos in prompts for name, video in videos.items()]
    count = max(len(video) for _, video in rows)
    shown = [*range(0, count, WINDOW), *([count - 1] if (count - 1) % WINDOW else [])]
    step = CELL + GAP
    picture = Image.new("RGB", (LABEL + len(shown) * step, TEXT + len(rows) * step), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for column, frame in enumerate(shown):
        draw.text((LABEL + column * step, 0), str(frame), fill=(0, 0, 0))
    for line, (name, video) in enumerate(rows):
        top = TEXT + line * step
        draw.text((GAP, top + CELL // 2), name, fill=(0, 0, 0))
        for column, frame in enumerate(shown):
            cell = Image.fromarray(video[frame]).resize((CELL, CELL), Image.Resampling.NEAREST)
            picture.paste(cell, (LABEL + column * step, top))
    picture.save(path, optimize=True)
