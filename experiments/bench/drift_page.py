"""The page of the study of drift (`experiments.bench.drift`), from the scores in its folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from dit_booth.evaluation.catalogue import describe
from dit_booth.evaluation.drift import last_minus_first
from dit_booth.evaluation.scores import Score, read_scores, write_scores
from dit_booth.files import write_text
from dit_booth.study.statistics import CrossedEstimate, Scores, estimate_mean, paired_difference

PRIMARY = ("keyframes-8", "first")
"""The primary contrast: the first minus the second, in the drift of `METRIC`."""
TRUTH = "truth"
METRIC = "appearance"
MOTION = ("speed", "rotation")
FINDINGS = "## What came out"
"""Heading of the section that is written by hand, and stays when the page is made anew."""
PICTURES = {"{}_frames.png": f"{METRIC} over the frames", "{}_sheet.png": "every 16th frame of two prompts"}
"""Pictures beside the page, by its name."""
METRICS = (METRIC, *MOTION, "right_shape")
TITLE = "# Drift in long videos\n"
MEASURES = f"""## Measures

**Drift** is the mean of the last quarter of the frames minus that of the first; {METRIC} is a distance to the true
subject, so positive drift is a video that gets worse. Levels stand beside it, because a video that is wrong from the
start cannot get much worse, and motion, because a video that stands still drifts least. `truth` is the prompts' real
videos: what the measures make of a perfect one. The last column compares with `{PRIMARY[0]}` on the seeds and prompts
that both have. Intervals are of 95 %, over training seeds and prompts (`dit_booth/study/statistics.py`).
"""
REPEAT = """## To repeat

```bash
python -m experiments.bench.drift --out runs/drift                               # an hour of one core; resumes
python -m experiments.bench.drift --out runs/drift --page docs/results/long.md   # this page, of what is there
python -m experiments.bench.drift --out docs/results/long.scores.jsonl.gz --page /tmp/long.md    # of the scores here
```
"""
DESIGN = f"""## Design

Videos of 128 frames of the toy world's long scenes, the first prompts of the `test` split, by the embedded DiT and its
`token_replacement+kv_concat` (`experiments/configs/long.yaml`).

* **Primary contrast**, declared before any of its videos was made: `{PRIMARY[0]}` minus `{PRIMARY[1]}`, drift of
  {METRIC}, five training seeds and 24 prompts. `first`: plan `self+first+previous`, the image's keys at frame 0.
  `keyframes-m`: plan `self+keyframes(m)`, the image's keys again at every m-th frame. In all variants the image also
  enters every frame by the subject's words (`token_replacement`): `kv_concat` alone, which was trained beside it, does
  not transfer the colours. Everything else has one seed and four prompts, and is exploratory.
* `window`: plan `window(8)`, the image at frame 0; `sink+window`: `sink(1)+window(8)`. All of these are made in
  chunks of 16 frames with a clean prefix of two.
* `diffusion_forcing`: the plan of `{PRIMARY[0]}`, trained with timesteps of their own in all frames, made by a queue.
  `freenoise`, `whole` (all frames at once) and `riflex` (the same with L = 16) have the weights of `{PRIMARY[0]}`,
  seed 0. `lvdm` has no row: it predicts clips by a strategy that this short training cannot teach.
* Each variant trains the strategies of the embedded pipeline for 40 steps of four crops of 16 frames, which hold a
  second keyframe (`keyframes-16` has none); the base stays as it is. The rate is low, 2e-5. It was chosen on four dev
  prompts, after two earlier designs had been thrown away: 300 or 100 shared steps of the whole network, at 1e-3 and
  2e-4, with timesteps of their own in all frames, forgot the subjects (right shape 0.01 and 0.02 of the last quarter),
  so that their drift meant nothing.
* Six sampling steps, no guidance. The oracle fits the true subject to every frame, and divides the scene's light out;
  frames with the bar, which passes in the middle half, have no value.
"""
LIMITS = """**What it cannot show.** The seeds are those of the 40 steps: all variants share one embedded pipeline, so
the intervals leave out what another base would do. Training never shows two frames that are more than 15 apart: `first`
reads frame 0 at distances that are new to the network. The words bring the image to all frames, which keeps `first`
from drifting as far as it could. Six steps without guidance are fewer than the demo's. Drawn shapes of 32 pixels.
"""
Results = dict[str, list[Score]]
"""Name of a variant -> its scores."""
Summary = Callable[[ArrayLike], float]


def read_results(source: Path, names: Sequence[str]) -> Results:
    """Return the scores of the variants that have some: of the study's folder, or of the file beside its page."""
    if source.is_file():
        scores = read_scores(source)
        found = {name: [one for one in scores if one.point == name] for name in names}
    else:
        found = {
            name: [
                replace(one, point=name)
                for file in sorted(source.glob(f"{name}-seed*/scores/*.jsonl"))
                for one in read_scores(file)
                if one.metric in METRICS
            ]
            for name in names
        }
    return {name: scores for name, scores in found.items() if scores}


def mean(values: ArrayLike) -> float:
    """Return the mean of the frames that have a value; NaN if none has."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan


def first_quarter(values: ArrayLike) -> float:
    return mean(np.asarray(values)[: _quarter(values)])


def last_quarter(values: ArrayLike) -> float:
    return mean(np.asarray(values)[-_quarter(values) :])


def _quarter(values: ArrayLike) -> int:
    return max(1, math.floor(len(np.asarray(values)) / 4 + 0.5))  # as `last_minus_first` has it


def values_of(scores: Sequence[Score], metric: str, of: Summary) -> Scores:
    """Return seed -> prompt -> `of` a metric's values over the frames, where it has one."""
    out: dict[int, dict[str, float]] = {}
    for one in scores:
        if one.metric == metric and not math.isnan(value := of(one.value)):
            out.setdefault(one.seed, {})[one.prompt] = value
    return out


def write_page(file: Path, results: Results) -> None:
    """Write the page, with the pictures beside it that are there, and all scores (.scores.jsonl.gz)."""
    figures = [*contrasts(results), "", *table(results)] if results else ["**There are no scores yet.**"]
    names = {name.format(file.stem): label for name, label in PICTURES.items()}
    pictures = [f"![{label}]({name})\n" for name, label in names.items() if file.with_name(name).is_file()]
    parts = [TITLE, findings(file), "## Figures\n", *figures, "", *pictures, MEASURES, REPEAT, DESIGN, LIMITS]
    write_text(file, "\n".join(parts))
    if results:
        write_scores(file.with_suffix(".scores.jsonl.gz"), chain.from_iterable(results.values()))


def findings(file: Path) -> str:
    """Return the section of the page that is written by hand; empty if there is none."""
    _, heading, rest = (file.read_text() if file.is_file() else "").partition(FINDINGS)
    return heading + rest.partition("\n## ")[0]


def table(results: Results) -> list[str]:
    """Return the table: levels and drift of the appearance, and motion, of every variant."""
    unit = describe(METRIC).unit
    lines = [
        f"| variant | seeds x prompts | {METRIC} ({unit}), first quarter | last quarter | drift | drift minus"
        f" {PRIMARY[0]}'s | right shape, last quarter | speed (sides per 100 frames) | rotation (degrees per frame) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = results.get(PRIMARY[0], [])
    for name, scores in results.items():
        drift = values_of(scores, METRIC, last_minus_first)
        beside = None if name in (PRIMARY[0], TRUTH) else difference(scores, base, METRIC, last_minus_first)
        cells = [
            f"{len(drift)} x {max(map(len, drift.values()), default=0)}",
            number(estimate(scores, METRIC, first_quarter)),
            number(estimate(scores, METRIC, last_quarter)),
            with_interval(estimate_mean(drift)),
            with_interval(beside),
            number(estimate(scores, "right_shape", last_quarter), 2),
            number(estimate(scores, "speed", mean), 2, 100),
            number(estimate(scores, "rotation", mean)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def estimate(scores: Sequence[Score], metric: str, of: Summary) -> CrossedEstimate | None:
    return estimate_mean(values_of(scores, metric, of))


def number(found: CrossedEstimate | None, digits: int = 1, scale: float = 1) -> str:
    return "-" if found is None else f"{found.mean * scale:.{digits}f}"


def with_interval(found: CrossedEstimate | None) -> str:
    if found is None:
        return "-"
    half = found.main.half
    return f"{found.mean:+.2f}" + ("" if math.isnan(half) else f" ± {half:.2f}")


def contrasts(results: Results) -> list[str]:
    """Return the primary contrast, in words, with its levels and motion beside it; nothing until both are there."""
    if not all(name in results for name in PRIMARY):
        return []
    ours, theirs = (results[name] for name in PRIMARY)
    main = difference(ours, theirs, METRIC, last_minus_first)
    if main is None:
        return []
    unit = describe(METRIC).unit
    said = (
        f"**{PRIMARY[0]} minus {PRIMARY[1]}**, {main.seeds} training seeds, {main.prompts} prompts: drift of"
        f" {METRIC} {with_interval(main)} {unit}, p = {main.main.p:.3f}"
    )
    verdict = "no difference shown" if main.main.p >= 0.05 else f"{PRIMARY[main.mean > 0]} drifts less"
    if main.exploratory:
        verdict = "exploratory: fewer training seeds than a test needs"
    beside = [
        f"{label} {with_interval(difference(ours, theirs, metric, of, scale))}"
        for label, metric, of, scale in (
            (f"{METRIC} of all frames ({unit})", METRIC, mean, 1.0),
            ("speed (sides per 100 frames)", "speed", mean, 100.0),
            ("rotation (degrees per frame)", "rotation", mean, 1.0),
        )
    ]
    return [f"{said}: {verdict}. Beside it, not tested: {'; '.join(beside)}."]


def difference(
    ours: Sequence[Score], theirs: Sequence[Score], metric: str, of: Summary, scale: float = 1
) -> CrossedEstimate | None:
    """Estimate a paired difference of a summary of a metric, on the seeds and prompts that both have."""

    def scaled(values: ArrayLike) -> float:
        return of(values) * scale

    return paired_difference(values_of(ours, metric, scaled), values_of(theirs, metric, scaled))
