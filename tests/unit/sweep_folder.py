"""Sweep folders for the tests of the report: small, with numbers that can be checked by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import repeat
from torchvision.utils import save_image

from dit_booth.data.video import write_video
from dit_booth.evaluation.scores import Score, write_scores
from dit_booth.report.study import COSTS

Palettes = Mapping[tuple[str, int], Sequence[float]]
"""(label, seed) -> the palette distance of every prompt; the first label is the baseline."""
TWO = {
    ("kept", 0): [10.0, 20.0],
    ("kept", 1): [12.0, 24.0],
    ("trained", 0): [7.0, 16.0],
    ("trained", 1): [9.0, 20.0],
}
COMMAND = "dit-booth sweep query_projection --override big.yaml"
CAPTIONS = ["a ring is shrinking on stone", "a <b>circle</b> & a square"]


PRIMARY = {"metric": "palette", "contrasts": "baseline"}


def write_sweep(
    folder: Path,
    palettes: Palettes = TWO,
    *,
    samples: bool = True,
    side: int = 12,
    primary: Mapping[str, Any] | None = PRIMARY,
    frames: int = 3,
) -> Path:
    """Every point finished, a coarse stage for each seed that all share, and samples of solid colours.

    A palette distance rises by 1 from frame to frame around its mean. The ground truth has 1.5, and the baseline's
    floors 20 (shuffled) and 30 (none) more than its own videos.
    """
    labels = list(dict.fromkeys(label for label, _ in palettes))
    rows = [
        _point(folder, label, labels.index(label), seed, values, side if samples else 0, frames)
        for (label, seed), values in palettes.items()
    ]
    for seed in dict.fromkeys(seed for _, seed in palettes):
        write_lines(folder / "stages" / f"coarse-c{seed}" / "metrics.jsonl", losses("coarse", 1.0 + seed))
    settings = {
        "name": "query_projection",
        "about": "How the query is made.",
        "seeds": [0, 1],
        "command": COMMAND,
        **({"primary": dict(primary)} if primary else {}),
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    write_rows(folder, rows)
    return folder


def _point(
    folder: Path, label: str, number: int, seed: int, palettes: Sequence[float], side: int, frames: int
) -> dict[str, Any]:
    name = f"p{number}s{seed}"
    run = folder / "points" / name
    write_lines(run / "metrics.jsonl", losses("fine", 2.0 + number))
    (run / "samples").mkdir(parents=True)
    write_scores(run / "samples" / "scores.jsonl", scores(palettes, seed, frames, floors=number == 0))
    if side:
        write_samples(run / "samples", len(palettes), side, frames, colour=number)
    settings = {
        "data": {"kind": "toyworld", "size": side or 12, "frames": frames},
        "clip": {"pretrained": "embedded"},
        "train": {"seed": seed, "lr": 0.001},
        "kv_concat": {"query": label},
        "out": str(run),
    }
    (run / "run.yaml").write_text(yaml.safe_dump(settings))
    (run / "finished").write_text("")
    stage = {"seconds": 10.0, "step_seconds": 0.5}
    return {
        "point": name,
        "label": label,
        "options": {"kv_concat.query": label},
        "seed": seed,
        "group": f"g{number}",
        "baseline": number == 0,
        "status": "finished",
        "error": [],
        "run": f"points/{name}",
        "metrics": {},
        "stages": [
            {"name": "coarse", "address": f"c{seed}", "steps": 30, "shared": True, **stage},
            {"name": "fine", "address": f"f{number}{seed}", "steps": 30, "shared": False, **stage},
        ],
        "trained_parameters": 1_200_000 + 100_000 * number,
        "flops_per_step": 4.12e10 + 1e9 * number,
        "step_seconds": 0.5 + 0.1 * number,
        "peak_memory_mib": 1480.0,
        "train_seconds": 300.0,
        "train_flops": 2.5e12 + 1e11 * number,
        "wall_seconds": 130.0,
        "launch_seconds": 8.0,
    }


def scores(palettes: Sequence[float], seed: int, frames: int, *, floors: bool) -> list[Score]:
    """What a run measures: palette and CLIP-I of each prompt, of the ground truth, and of floors if wanted."""
    values = {"": palettes, "truth": [1.5] * len(palettes)}
    if floors:
        values |= {"shuffled": [v + 20 for v in palettes], "none": [v + 30 for v in palettes]}
    out = []
    for control, own in values.items():
        rise = 0 if control == "truth" else 1
        for i, value in enumerate(own):
            about = {"prompt": f"toy/{i}", "seed": seed, "control": control}
            curve = tuple(value + rise * (f - (frames - 1) / 2) for f in range(frames))
            out.append(Score(metric="palette", value=curve, **about))
            out.append(Score(metric="clip_i", value=0.9 - value / 100, **about))
    return out


def write_samples(samples: Path, count: int, side: int, frames: int, colour: int) -> None:
    """The videos of a run's sample folder, and the table of what they were to show."""
    (samples / "image").mkdir()
    with (samples / "videos.csv").open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["video", "image", "caption", "subject", "prompt", "noise_seed", "control", "truth"])
        for i in range(count):
            picture = repeat(
                torch.tensor([0.2 * (i % 5), 0.3 * colour % 1, 0.5]), "c -> c h w", h=side, w=side
            )
            save_image(picture, samples / "image" / f"{i:03d}.png")
            video = repeat(picture * 2 - 1, "c h w -> f c h w", f=frames)
            write_video(samples / f"{i:03d}-seed0.mp4", video, fps=8)
            write_video(samples / "truth" / f"{i:03d}.mp4", video.flip(1), fps=8)
            given = [f"{i:03d}-seed0.mp4", f"image/{i:03d}.png", CAPTIONS[i % 2], "", f"toy/{i}"]
            table.writerow([*given, "0", "", f"truth/{i:03d}.mp4"])


def losses(stage: str, height: float, steps: int = 30) -> list[dict[str, Any]]:
    """A stage's lines: a loss that halves on the way."""
    return [
        {"stage": stage, "step": i + 1, "loss": height * 0.5 ** (i / steps), "seconds": 0.5} for i in range(steps)
    ]  # fmt: skip


def write_lines(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sweep.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_lines(folder / "sweep.jsonl", rows)


def fail(folder: Path, point: str, *error: str) -> None:
    """Turn a point into one that failed, or waits if there is no error."""
    rows = read_rows(folder)
    empty = {"metrics": {}, "status": "failed" if error else "waiting", "error": list(error)}
    empty |= dict.fromkeys((*COSTS, "launch_seconds"))
    write_rows(folder, [row | empty if row["point"] == point else row for row in rows])
