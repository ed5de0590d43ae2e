"""Coverage of a human study's intervals, and the power formula, over simulated studies with known preferences.

python -m experiments.bench.human_study --studies 200 --table docs/results/human_study.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.optimize import brentq
from tqdm import tqdm

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.folder import write_videos
from dit_booth.human.agreement import side_rate
from dit_booth.human.analyse import estimate_preferences
from dit_booth.human.crossed import Rate
from dit_booth.human.design import Design, Slot, draw_cells, draw_lists
from dit_booth.human.exclude import observations
from dit_booth.human.key import Clip, Key, KeyPrompt, KeySystem, Trial
from dit_booth.human.power import Plan, detectable
from dit_booth.human.simulate import Population, population_shares, population_strengths, simulate_answers
from dit_booth.human.strengths import estimate_strengths

QUESTION = "quality"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    studies: int = 200
    """Simulated studies of each case."""
    table: str = ""
    """Markdown file to write; empty: none."""


@dataclass(frozen=True, kw_only=True)
class SimulatedCase:
    """A study's size and its population."""

    name: str
    raters: int
    prompts: int
    pairs: int
    population: Population
    design: Design = "all"

    @property
    def strengths(self) -> Sequence[float]:
        return self.population.strengths[QUESTION]


def case(
    name: str,
    raters: int,
    prompts: int,
    pairs: int,
    strengths: Sequence[float],
    design: Design = "all",
    **population: float,
) -> SimulatedCase:
    people = Population(strengths={QUESTION: strengths}, **population)
    sizes = {"raters": raters, "prompts": prompts, "pairs": pairs}
    return SimulatedCase(name=name, population=people, design=design, **sizes)


CASES = (
    case("both effects", 20, 12, 24, (0.8, 0.2, -1.0), rater_sd=0.5, prompt_sd=0.5),
    case("no effects", 20, 12, 24, (0.8, 0.2, -1.0), rater_sd=0.0, prompt_sd=0.0),
    case("prompts dominate", 24, 16, 20, (0.5, 0.0, 0.0, -0.5), rater_sd=0.2, prompt_sd=0.9),
    case("few of both", 8, 8, 16, (0.6, 0.0, -0.6), rater_sd=0.5, prompt_sd=0.5),
    case("blocks of 3", 20, 30, 24, (0.8, 0.4, 0.0, -0.4, -0.8), "blocks", rater_sd=0.5, prompt_sd=0.5),
)


def plain_key(
    systems: int,
    prompts: int,
    raters: int,
    pairs: int,
    questions: Sequence[str],
    seed: int,
    design: Design = "all",
    **checks: int,
) -> Key:
    """Return the key of a study without videos; `checks`: planted and repeats."""
    rng = np.random.default_rng(seed)
    cells = draw_cells(design, systems, prompts, block=3, rng=rng)
    numbers = {"planted": 0, "repeats": 0, **checks}
    lists = draw_lists(cells, raters=raters, pairs=pairs, rng=rng, **numbers)
    clips = [Clip(prompt=p, system=s) for p in range(prompts) for s in range(systems)]
    clips += [Clip(prompt=p, intact=intact) for p in range(numbers["planted"]) for intact in (True, False)]

    def trial(slot: Slot) -> Trial:
        if slot.kind == "planted":
            prompt, first = slot.index, prompts * systems + 2 * slot.index
            pair = [first, first + 1]
        else:
            cell = cells[slot.index]
            prompt, pair = cell.prompt, [cell.prompt * systems + s for s in (cell.first, cell.second)]
        left, right = reversed(pair) if slot.swapped else pair
        return Trial(kind=slot.kind, prompt=prompt, left=left, right=right)

    return Key(
        title="simulated",
        seed=seed,
        design=design,
        systems=tuple(KeySystem(name=f"system {s}", folder="") for s in range(systems)),
        prompts=tuple(KeyPrompt(name=str(p), caption="", subject="") for p in range(prompts)),
        questions=tuple(questions),
        clips=tuple(clips),
        lists=tuple(tuple(map(trial, own)) for own in lists),
    ).signed()


def simulate(one: SimulatedCase, seed: int) -> dict[str, list[bool]]:
    """Return whether each interval of one simulated study covers the population's value, by kind."""
    key = plain_key(len(one.strengths), one.prompts, one.raters, one.pairs, [QUESTION], seed, one.design)
    own = observations(
        key, simulate_answers(key, one.population, one.raters, np.random.default_rng((1, seed)))
    )
    shares = population_shares(one.population, QUESTION)
    found = estimate_strengths(own, len(key.systems), seed).systems
    true = population_strengths(one.population, QUESTION)
    side = side_rate(own)
    assert side is not None
    return {
        "preferences": [
            covers(p.rate, float(shares[p.first, p.second] @ (1, 0.5, 0))) for p in estimate_preferences(own)
        ],
        "strengths": [e.low <= value <= e.high for e, value in zip(found, true, strict=True)],
        "side": [covers(side, 0.5)],
        "ranking": [bool(np.argmax([e.mean for e in found]) == np.argmax(true))],
    }


def covers(rate: Rate, value: float) -> bool:
    return rate.low <= value <= rate.high


def coverage(one: SimulatedCase, studies: int) -> dict[str, float]:
    """Return the share of intervals that cover, by kind, and of studies that find the best system."""
    runs = [simulate(one, seed) for seed in tqdm(range(studies), desc=one.name)]
    return {kind: float(np.mean([hit for run in runs for hit in run[kind]])) for kind in runs[0]}


def simulated_power(studies: int, seed: int = 0) -> tuple[float, float]:
    """Return the share that the formula says is detected with a power of 0.8, and the power that simulations have.

    Two systems. The deviations of raters and prompts on the scale of shares are those of strengths times the slope.
    """
    sd, ties, raters, prompts = 0.5, 0.5, 24, 16
    base = Population(strengths={QUESTION: (0.0, 0.0)}, rater_sd=sd, prompt_sd=sd, ties=ties)

    def share(strength: float) -> tuple[float, float]:
        people = replace(base, strengths={QUESTION: (strength / 2, -strength / 2)})
        wins, even, _ = population_shares(people, QUESTION)[0, 1]
        return float(wins + even / 2), float(even)

    slope = (share(0.01)[0] - share(-0.01)[0]) / 0.02
    plan = Plan(raters=raters, prompts=prompts, pairs=prompts, systems=2, ties=share(0)[1],
                rater_sd=slope * sd * 2**0.5, prompt_sd=slope * sd * 2**0.5)  # fmt: skip
    wanted = detectable(plan).share
    strength = brentq(lambda strength: share(strength)[0] - wanted, 0, 20)
    people = replace(base, strengths={QUESTION: (strength / 2, -strength / 2)})
    hits = []
    for number in tqdm(range(studies), desc="power"):
        key = plain_key(2, prompts, raters, prompts, [QUESTION], number)
        own = observations(key, simulate_answers(key, people, raters, np.random.default_rng((seed, number))))
        hits.append(estimate_preferences(own)[0].rate.low > 0.5)
    return wanted, float(np.mean(hits))


def lines(studies: int) -> Iterator[str]:
    """Run everything, and iterate over the lines of a page."""
    yield "# Human study: coverage and power\n"
    yield f"Repeat with `python -m experiments.bench.human_study --studies {studies}`. Simulated raters answer by"
    yield "Davidson's model, with normal deviations of each rater and each prompt. An interval covers if it holds the"
    yield "population's value; 95 % should.\n"
    heads = ["case", "systems", "raters", "prompts", "pairs each", "rater sd", "prompt sd"]
    heads += ["preferences", "strengths", "side", "best found"]
    yield f"| {' | '.join(heads)} |"
    yield "|" + " --- |" * len(heads)
    for one in CASES:
        found = coverage(one, studies)
        sizes = [
            len(one.strengths),
            one.raters,
            one.prompts,
            one.pairs,
            one.population.rater_sd,
            one.population.prompt_sd,
        ]
        cells = [
            one.name,
            *sizes,
            *(f"{found[kind]:.3f}" for kind in ("preferences", "strengths", "side", "ranking")),
        ]
        yield f"| {' | '.join(map(str, cells))} |"
    share, power = simulated_power(studies)
    yield f"\nPower: by the formula 24 raters and 16 prompts detect a share of {share:.3f} with a power of 0.80; of"
    yield f"{studies} simulated studies with that share, {power:.3f} detect it."


def write_demo(
    folder: Path, name: str, noise: float, *, prompts: int, size: int = 64, frames: int = 8
) -> Path:
    """Write a system's folder: the toy world's videos, with noise of its own."""
    world = Toyworld(ToyworldConfig(size=size, frames=frames, split="test"))
    cases = {}
    for index in range(prompts):
        example = world[index]
        random = torch.Generator().manual_seed(index)
        video = example.video + noise * torch.randn(example.video.shape, generator=random)
        file = f"{index:03d}.mp4"
        write_video(folder / name / file, video, fps=8)
        cases[file] = Case(
            video=video.clamp(-1, 1),
            image=example.image,
            caption=example.caption,
            subject=example.subject,
            prompt=example.key,
            truth=example.video,
        )
    write_videos(folder / name, cases, fps=8)
    return folder / name


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    text = "\n".join(lines(arguments.studies)) + "\n"
    print(text)
    if arguments.table:
        Path(arguments.table).write_text(text)


if __name__ == "__main__":
    main()
