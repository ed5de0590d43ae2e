"""Metrics as predictors of people: how often the system that a metric prefers is the one that a rater prefers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_booth.evaluation.catalogue import describe
from dit_booth.evaluation.scores import SCORES, read_scores
from dit_booth.human.agreement import others_majority
from dit_booth.human.crossed import Rate, estimate_rate
from dit_booth.human.exclude import Observation
from dit_booth.human.key import Key

Values = Mapping[str, Mapping[tuple[int, int], float]]
"""Metric -> (system, prompt) -> value, of metrics with a better direction."""
PEOPLE = "other raters"
"""The majority of the others who saw a pair, for comparison."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A metric's accuracy at one question; 0.5 is chance."""

    metric: str
    label: str
    question: str
    rate: Rate


def read_metrics(key: Key, folder: Path) -> Values:
    """Read the scores of the systems' videos beside them, where they have been scored.

    Raises:
        ValueError: a line of a file is no score.
    """
    numbers = {prompt.name: number for number, prompt in enumerate(key.prompts)}
    found: dict[str, dict[tuple[int, int], float]] = {}
    for index, system in enumerate(key.systems):
        file = folder / system.folder / SCORES
        for score in read_scores(file) if file.is_file() else ():
            own = not score.control and score.noise_seed == system.noise_seed and score.prompt in numbers
            if own and describe(score.metric).better and not math.isnan(score.mean):
                found.setdefault(score.metric, {})[index, numbers[score.prompt]] = score.mean
    return found


def estimate_accuracies(own: Sequence[Observation], metrics: Values) -> list[Accuracy]:
    """Estimate every metric's accuracy for each question, over answers that are no ties; first that of other raters.

    A metric that gives both videos the same value is right half of the time.
    """
    out = []
    for question in dict.fromkeys(o.question for o in own):
        asked = [o for o in own if o.question == question]
        out.append((PEOPLE, question, asked, others_majority(asked)))
        for name, values in metrics.items():
            out.append((name, question, asked, [_prediction(name, values, o) for o in asked]))
    return [a for row in out if (a := _accuracy(*row)) is not None]


def _prediction(metric: str, values: Mapping[tuple[int, int], float], o: Observation) -> float:
    """Return 1 if the metric prefers the first system, 0 if the second, 0.5 if neither, NaN if it is unknown."""
    first, second = values.get((o.first, o.prompt), math.nan), values.get((o.second, o.prompt), math.nan)
    if math.isnan(first) or math.isnan(second):
        return math.nan
    ahead = describe(metric).better * ((first > second) - (first < second))
    return 0.5 + ahead / 2


def _accuracy(
    metric: str, question: str, own: Sequence[Observation], predictions: Sequence[float]
) -> Accuracy | None:
    both = [
        (o, 1 - abs(o.value - p))
        for o, p in zip(own, predictions, strict=True)
        if o.value != 0.5 and not math.isnan(p)
    ]
    rate = estimate_rate(
        [right for _, right in both], [o.rater for o, _ in both], [o.prompt for o, _ in both]
    )
    if rate is None:
        return None
    label = metric if metric == PEOPLE else describe(metric).label
    return Accuracy(metric=metric, label=label, question=question, rate=rate)
