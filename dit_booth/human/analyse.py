"""From answers to results: exclusions, preferences, strengths, agreement, and metrics as predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dit_booth.human.agreement import Alpha, Learning, estimate_alpha, estimate_learning, side_rate
from dit_booth.human.answers import Collected
from dit_booth.human.crossed import Rate, estimate_rate
from dit_booth.human.exclude import Checked, Observation, Rules, check_rater, observations
from dit_booth.human.key import Key
from dit_booth.human.predict import Accuracy, Values, estimate_accuracies
from dit_booth.human.strengths import Strengths, estimate_strengths


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Share of answers for the `first` of two systems, a tie counting half, and the share of ties."""

    question: str
    first: int
    second: int
    rate: Rate
    ties: float


@dataclass(frozen=True, kw_only=True)
class Results:
    """All figures of a study; raters are those who are not excluded."""

    key: Key
    rules: Rules
    collected: Collected
    checked: tuple[Checked, ...]
    observations: tuple[Observation, ...]
    preferences: tuple[Preference, ...]
    strengths: dict[str, Strengths]
    alphas: dict[str, Alpha]
    side: Rate | None
    learning: Learning
    accuracies: tuple[Accuracy, ...]

    @property
    def kept(self) -> list[Checked]:
        return [one for one in self.checked if not one.excluded]

    @property
    def excluded(self) -> list[Checked]:
        return [one for one in self.checked if one.excluded]


def analyse(key: Key, collected: Collected, rules: Rules, metrics: Values) -> Results:
    """Compute all results. ValueError: no rater is left, or none has answered about two systems."""
    checked = [check_rater(key, rater, rules) for rater in collected.raters.values()]
    raters = [one.rater for one in checked if not one.excluded]
    if not raters:
        raise ValueError(
            f"all {len(checked)} raters are excluded, the first: {checked[0].excluded}; collect more answers"
        )
    own = observations(key, raters)
    if not own:
        raise ValueError(f"{len(raters)} raters have answered checks only; collect more answers")
    asked = {q: [o for o in own if o.question == q] for q in key.questions}
    asked = {question: found for question, found in asked.items() if found}
    return Results(
        key=key,
        rules=rules,
        collected=collected,
        checked=tuple(checked),
        observations=tuple(own),
        preferences=tuple(p for found in asked.values() for p in estimate_preferences(found)),
        strengths={
            question: estimate_strengths(found, len(key.systems)) for question, found in asked.items()
        },
        alphas={question: estimate_alpha(found) for question, found in asked.items()},
        side=side_rate(own),
        learning=estimate_learning(own, {rater.id: len(rater.trials(key)) for rater in raters}),
        accuracies=tuple(estimate_accuracies(own, metrics)),
    )


def estimate_preferences(own: Sequence[Observation]) -> list[Preference]:
    """Estimate the preference in each pair of systems, from the answers to one question."""
    out = []
    for first, second in sorted({(o.first, o.second) for o in own}):
        pair = [o for o in own if (o.first, o.second) == (first, second)]
        rate = estimate_rate([o.value for o in pair], [o.rater for o in pair], [o.prompt for o in pair])
        assert rate is not None
        ties = sum(o.value == 0.5 for o in pair) / len(pair)
        out.append(Preference(question=pair[0].question, first=first, second=second, rate=rate, ties=ties))
    return out
