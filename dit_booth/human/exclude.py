"""Exclusion of careless raters by attention checks, and the observations of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dit_booth.errors import check_ranges
from dit_booth.human.answers import Answer, Choice, Rater
from dit_booth.human.key import Key, Trial

_FLIP: dict[Choice, Choice] = {"left": "right", "tie": "tie", "right": "left"}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Limits, to be set before the answers are seen."""

    min_planted: float = 0.75
    """Share of planted pairs that a rater must get right, or is excluded; a tie is wrong."""
    max_flips: float = 0.75
    """Share of repeated answers that may name the other video; who always takes one side has 1."""

    def __post_init__(self) -> None:
        check_ranges(self, "", min_planted="[0, 1]", max_flips="[0, 1]")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A rater with the results of the checks; `excluded` is the reason, if there is one."""

    rater: Rater
    planted: int
    planted_right: int
    repeated: int
    flipped: int
    excluded: str


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One answer about two systems: `value` is 1 if the `first` is preferred, 0 if the `second`, 0.5 for a tie."""

    rater: str
    question: str
    prompt: int
    first: int
    second: int
    value: float
    swapped: bool
    """True if the first system was on the right."""
    trial: int
    seconds: float

    @property
    def right(self) -> float:
        """Return 1 if the right side was chosen, 0 for the left, 0.5 for a tie."""
        return self.value if self.swapped else 1 - self.value

    @property
    def cell(self) -> tuple[int, int, int]:
        return self.prompt, self.first, self.second


def check_rater(key: Key, rater: Rater, rules: Rules) -> Checked:
    """Apply the rules to a rater."""
    trials = rater.trials(key)
    planted = [(trials[a.trial], a) for a in rater.answers.values() if trials[a.trial].kind == "planted"]
    right = sum(a.choice == ("left" if key.clips[t.left].intact else "right") for t, a in planted)
    pairs = list(_repeated(trials, rater))
    flips = sum(again.choice == first.choice for first, again in pairs if first.choice != "tie")
    excluded = ""
    if not rater.answers:
        excluded = "answered nothing"
    elif planted and right < rules.min_planted * len(planted):
        excluded = f"{right} of {len(planted)} planted pairs right"
    elif pairs and flips > rules.max_flips * len(pairs):
        excluded = f"{flips} of {len(pairs)} repeated answers name the other video"
    return Checked(
        rater=rater,
        planted=len(planted),
        planted_right=right,
        repeated=len(pairs),
        flipped=flips,
        excluded=excluded,
    )


def _repeated(trials: Sequence[Trial], rater: Rater) -> Iterator[tuple[Answer, Answer]]:
    """Iterate over (answer, answer to the same question about the same pair with its sides swapped)."""
    first = {(t.left, t.right): number for number, t in enumerate(trials) if t.kind == "pair"}
    for (number, question), again in rater.answers.items():
        trial = trials[number]
        if trial.kind == "repeat":
            before = rater.answers.get((first[trial.right, trial.left], question))
            if before is not None:
                yield before, again


def observations(key: Key, raters: Sequence[Rater]) -> list[Observation]:
    """Return the answers to pairs of systems; planted and repeated ones are checks only."""
    return [
        _observation(key, rater, trial, answer)
        for rater in raters
        for answer in rater.answers.values()
        if (trial := rater.trials(key)[answer.trial]).kind == "pair"
    ]


def _observation(key: Key, rater: Rater, trial: Trial, answer: Answer) -> Observation:
    left, right = key.clips[trial.left].system, key.clips[trial.right].system
    assert left is not None and right is not None
    swapped = left > right
    choice = _FLIP[answer.choice] if swapped else answer.choice
    return Observation(
        rater=rater.id,
        question=answer.question,
        prompt=trial.prompt,
        first=min(left, right),
        second=max(left, right),
        value={"left": 1.0, "tie": 0.5, "right": 0.0}[choice],
        swapped=swapped,
        trial=answer.trial,
        seconds=answer.ms / 1000,
    )
