"""Sizes of a human study: the smallest preference that it detects, with answers clustered by rater and by prompt.

An answer about two systems is 1, 0.5 (a tie) or 0. Its share has the variance

    rater_sd^2 / R + prompt_sd^2 / P + residual / N

for its N answers by R raters about P prompts (crossed random effects, as in the analysis). A share of 0.5 + d is
detected with probability `power` by a two-sided test at level `level` if d = (t(1 - level / 2) + t(power)) SE, with
Satterthwaite's degrees of freedom. More answers of the same raters about the same prompts shrink the last term only.
In a design of blocks, a pair of systems has its own prompts only; strengths use the others too, and are a little surer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scipy.special import stdtrit

from dit_booth.errors import check_ranges
from dit_booth.human.design import Design
from dit_booth.study.statistics import satterthwaite


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study of `raters`, who each answer `pairs` of the design's pairs of videos."""

    raters: int = 20
    """Raters who count: exclusions come on top."""
    prompts: int = 12
    """Prompts of the study."""
    pairs: int = 24
    """Pairs of videos for each rater."""
    systems: int = 3
    """Systems that are compared."""
    design: Design = "all"
    """Pairs: all of them, each system with the first one (baseline), or blocks of some systems for each prompt."""
    block: int = 3
    """Systems of a prompt in a design of blocks."""
    rater_sd: float = 0.1
    """Standard deviation of the share over raters: at 0.1, two thirds are within 0.1 of the mean."""
    prompt_sd: float = 0.15
    """The same over prompts."""
    ties: float = 0.2
    """Share of ties."""
    power: float = 0.8
    """Probability to detect a preference of the size that is told."""
    level: float = 0.05
    """Level of the two-sided test."""
    comparisons: int = 1
    """Tests that the level is divided among (Bonferroni)."""

    def __post_init__(self) -> None:
        check_ranges(self, "", raters="[2, 100000]", prompts="[2, 100000]", pairs="[1, 100000]")
        check_ranges(self, "", systems="[2, 1000]", comparisons="[1, 100000]")
        check_ranges(self, "", rater_sd="[0, 0.5]", prompt_sd="[0, 0.5]", ties="[0, 1)")
        check_ranges(self, "", power="(0.05, 1)", level="(0, 0.5]")
        if self.design == "blocks" and not 2 <= self.block <= self.systems:
            raise ValueError(f"block is {self.block}; use a number of systems in [2, {self.systems}]")
        if self.prompts < self.least_prompts:
            raise ValueError(
                f"prompts is {self.prompts}; with blocks of {self.block} of {self.systems} systems, each pair is"
                f" compared for {self.shared_prompts:.2g}: use at least {self.least_prompts}, or larger blocks"
            )
        if self.pairs > self.cells:
            raise ValueError(f"pairs is {self.pairs}; there are {self.cells} pairs of videos: use fewer")

    @property
    def system_pairs(self) -> int:
        """Return the number of pairs of systems that are compared."""
        return self.systems - 1 if self.design == "baseline" else math.comb(self.systems, 2)

    @property
    def cells(self) -> int:
        """Return the number of pairs of videos."""
        each = math.comb(self.block, 2) if self.design == "blocks" else self.system_pairs
        return self.prompts * each

    @property
    def shared_prompts(self) -> float:
        """Return the mean number of prompts for which a pair of systems is compared."""
        return self.cells / self.system_pairs

    @property
    def least_prompts(self) -> int:
        """Return the smallest number of prompts that compares each pair of systems for two."""
        return math.ceil(2 * self.prompts / self.shared_prompts)


@dataclass(frozen=True, kw_only=True)
class Detectable:
    """The share that a plan detects (inf: none up to 1), its standard error, and answers to each pair of systems."""

    share: float
    stderr: float
    answers: float


def detectable(plan: Plan) -> Detectable:
    """Return the smallest share above 0.5 that a plan detects."""
    answers = plan.raters * plan.pairs / plan.system_pairs
    residual = max(0.0, (1 - plan.ties) / 4 - plan.rater_sd**2 - plan.prompt_sd**2)
    raters, prompts = min(plan.raters, answers), min(plan.shared_prompts, answers)
    parts = plan.rater_sd**2 / raters, plan.prompt_sd**2 / prompts, residual / answers
    free = [max(1.0, raters - 1), max(1.0, prompts - 1)]
    free.append(max(*free, answers - sum(free) - 1))
    variance, df = sum(parts), satterthwaite(parts, free)
    quantiles = stdtrit(df, 1 - plan.level / plan.comparisons / 2) + stdtrit(df, plan.power)
    share = 0.5 + float(quantiles) * math.sqrt(variance)
    return Detectable(share=share if share <= 1 else math.inf, stderr=math.sqrt(variance), answers=answers)


def raters_needed(plan: Plan, share: float, most: int = 2000) -> int | None:
    """Return the smallest number of raters that detects a share; None if `most` do not: more prompts are needed."""
    if detectable(replace(plan, raters=most)).share > share:
        return None
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if detectable(replace(plan, raters=middle)).share <= share else (middle + 1, high)
        )
    return low
