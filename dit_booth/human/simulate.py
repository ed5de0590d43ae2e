"""Raters with known preferences: for tests of the analysis and of the power formula, and what it must find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dit_booth.human.answers import Answer, Choice, Rater
from dit_booth.human.key import Key, Trial
from dit_booth.human.strengths import fit_davidson

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Population:
    """A population of raters and prompts.

    Attributes:
        strengths: of each system, by question (`strengths` module).
        rater_sd, prompt_sd: standard deviation of a rater's, and of a prompt's, own deviations of each strength.
        ties: Davidson's nu.
        side: added to the right video's strength: a side bias.
        careless: share of raters who answer at random.
    """

    strengths: Mapping[str, Sequence[float]]
    rater_sd: float = 0.5
    prompt_sd: float = 0.5
    ties: float = 0.5
    side: float = 0.0
    careless: float = 0.0


@dataclass
class SimulatedRater:
    """Answers trials by Davidson's model; a careless one at random."""

    population: Population
    prompts: Mapping[str, Array]
    """Effects of each prompt by question: `prompts systems`."""
    rng: np.random.Generator
    careless: bool = False
    own: dict[str, Array] = field(default_factory=dict)

    def choose(self, key: Key, trial: Trial, question: str) -> Choice:
        if self.careless:
            return ("left", "tie", "right")[int(self.rng.integers(3))]
        left, right = key.clips[trial.left], key.clips[trial.right]
        if left.system is None or right.system is None:
            return "left" if left.intact else "right"
        strengths = np.asarray(self.population.strengths[question], dtype=np.float64)
        if question not in self.own:
            self.own[question] = self.rng.normal(0, self.population.rater_sd, len(strengths))
        felt = strengths + self.own[question] + self.prompts[question][trial.prompt]
        difference = felt[left.system] - felt[right.system] - self.population.side
        odds = np.array([np.exp(difference / 2), self.population.ties, np.exp(-difference / 2)])
        return ("left", "tie", "right")[int(self.rng.choice(3, p=odds / odds.sum()))]


def draw_raters(
    key: Key, population: Population, count: int, rng: np.random.Generator
) -> list[SimulatedRater]:
    """Draw raters, and the effects of the prompts, which they share."""
    systems = len(key.systems)
    prompts = {q: rng.normal(0, population.prompt_sd, (len(key.prompts), systems)) for q in key.questions}
    careless = round(population.careless * count)
    return [SimulatedRater(population, prompts, rng, careless=number < careless) for number in range(count)]


def simulate_answers(key: Key, population: Population, count: int, rng: np.random.Generator) -> list[Rater]:
    """Answer whole lists with `count` raters; the careless ones are the first."""
    raters = []
    for number, simulated in enumerate(draw_raters(key, population, count, rng)):
        own = number % len(key.lists)
        answers: dict[tuple[int, str], Answer] = {}
        for trial, shown in enumerate(key.lists[own]):
            for question in key.questions:
                choice = simulated.choose(key, shown, question)
                n = len(answers)
                answers[trial, question] = Answer(trial=trial, question=question, choice=choice, ms=4000, n=n)
        raters.append(Rater(id=rng.bytes(16).hex(), list=own, answers=answers))
    return raters


def population_shares(population: Population, question: str) -> dict[tuple[int, int], Array]:
    """Return the shares of wins, ties and losses of each pair of systems in the whole population, without side bias."""
    strengths = population.strengths[question]
    spread = np.sqrt(2 * (population.rater_sd**2 + population.prompt_sd**2))
    points, weights = np.polynomial.hermite_e.hermegauss(61)
    shares = {}
    for first, second in combinations(range(len(strengths)), 2):
        d = strengths[first] - strengths[second] + spread * points
        odds = np.stack([np.exp(d / 2), np.full_like(d, population.ties), np.exp(-d / 2)])
        shares[first, second] = (odds / odds.sum(0)) @ (weights / weights.sum())
    return shares


def population_strengths(population: Population, question: str) -> Array:
    """Return the strengths that the analysis estimates: Davidson's model fitted to the population's shares."""
    shares = population_shares(population, question)
    counts = 1e6 * np.stack(list(shares.values()))
    return fit_davidson(counts, list(shares), len(population.strengths[question]))[0]
