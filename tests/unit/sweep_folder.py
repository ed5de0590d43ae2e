"""Sweep folders for the tests of the report: small, with numbers that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from einops import repeat
from torchvision.utils import save_image

from dit_booth.data.video import write_video
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


def write_sweep(folder: Path, palettes: Palettes = TWO, *, samples: bool = True, side: int = 12) -> Path:
    """Every point finished, a coarse stage for each seed that all share, and samples of solid colours."""
    labels = list(dict.fromkeys(label for label, _ in palettes))
    rows = [
        _point(folder, label, labels.index(label), seed, values, samples=samples, side=side)
        for (label, seed), values in palettes.items()
    ]
    for seed in dict.fromkeys(seed for _, seed in palettes):
        write_lines(folder / "stages" / f"coarse-c{seed}" / "metrics.jsonl", losses("coarse", 1.0 + seed))
    settings = {
        "name": "query_projection",
        "about": "How the query is made.",
        "seeds": [0, 1],
        "command": COMMAND,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(settings))
    write_rows(folder, rows)
    return folder


def _point(
    folder: Path, label: str, number: int, seed: int, palettes: Sequence[float], *, samples: bool, side: int
) -> dict[str, Any]:
    name = f"p{number}s{seed}"
    run = folder / "points" / name
    prompts = [
        {"key": f"toy/{i}", "caption": CAPTIONS[i % 2], "palette": v, "clip_i": 0.9 - v / 100, "truth_palette": 1.5}
        for i, v in enumerate(palettes)
    ]  # fmt: skip
    write_lines(run / "metrics.jsonl", [*losses("fine", 2.0 + number), {"samples": means(prompts)}])
    if samples:
        write_samples(run / "samples", prompts, side, colour=number)
    settings = {
        "data": {"kind": "toyworld", "size": side, "frames": 3},
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
        "metrics": means(prompts),
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


def write_samples(samples: Path, prompts: Sequence[Mapping[str, Any]], side: int, colour: int) -> None:
    """What a run leaves in its sample folder."""
    write_lines(samples / "metrics.jsonl", prompts)
    (samples / "prompt").mkdir(parents=True)
    for i in range(len(prompts)):
        picture = repeat(torch.tensor([0.2 * i, 0.3 * colour, 0.5]), "c -> c h w", h=side, w=side)
        save_image(picture, samples / "prompt" / f"{i:03d}.png")
        video = repeat(picture * 2 - 1, "c h w -> f c h w", f=3)
        write_video(samples / f"{i:03d}.mp4", video, fps=8)
        write_video(samples / "truth" / f"{i:03d}.mp4", video.flip(1), fps=8)


def means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, standard error and number, as a run's log and ``sweep.jsonl`` have them."""
    out = {}
    for name in [name for name in rows[0] if name not in ("key", "caption")]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        stderr = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
        out[name] = {"mean": float(values.mean()), "stderr": stderr, "n": len(values)}
    return out


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
