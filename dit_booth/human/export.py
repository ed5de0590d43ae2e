"""A study's results as CSV (one line for each figure) and LaTeX (booktabs)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dit_booth.human.analyse import Results
from dit_booth.human.crossed import Rate
from dit_booth.report.export import csv_text, tabular, tex
from dit_booth.report.svg import MINUS
from dit_booth.study.statistics import Estimate

_HEADER = ("figure", "question", "item", "against", "value", "low", "high", "answers", "raters", "prompts")


def to_csv(results: Results) -> str:
    """Return a line for each preference, strength, agreement, bias, accuracy and rater."""
    return csv_text([list(_HEADER), *_lines(results)])


def _lines(results: Results) -> Iterator[list[str]]:
    names = [system.name for system in results.key.systems]
    for p in results.preferences:
        pair = [p.question, names[p.first], names[p.second]]
        yield ["preference", *pair, *_rate(p.rate)]
        yield ["ties", *pair, repr(p.ties), "", "", str(p.rate.answers), "", ""]
    for question, strengths in results.strengths.items():
        for name, estimate in zip(names, strengths.systems, strict=True):
            yield ["strength", question, name, "", *_estimate(estimate)]
    for question, alpha in results.alphas.items():
        yield ["alpha", question, "", "", *map(_number, (alpha.value, alpha.low, alpha.high)), "", "", ""]
    for a in results.accuracies:
        yield ["accuracy", a.question, a.metric, "", *_rate(a.rate)]
    if results.side is not None:
        yield ["right_side", "", "", "", *_rate(results.side)]
    for name in ("seconds_ratio", "ties", "agreement"):
        change = getattr(results.learning, name)
        if change is not None:
            yield [f"change_{name}", "", "", "", *_estimate(change)]
    for one in results.checked:
        share = _number(one.planted_right / one.planted if one.planted else math.nan)
        yield ["rater", "", one.rater.id, one.excluded, share, "", "", str(len(one.rater.answers)), "", ""]


def _rate(rate: Rate) -> list[str]:
    ends = [_number(value) for value in (rate.mean, rate.low, rate.high)]
    return [*ends, str(rate.answers), str(rate.raters), str(rate.prompts)]


def _estimate(estimate: Estimate) -> list[str]:
    return [*map(_number, (estimate.mean, estimate.low, estimate.high)), "", "", ""]


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def to_latex(results: Results) -> str:
    """Return tables of strengths and preferences, a column for each question, with 95 % intervals."""
    questions = list(results.strengths)
    names = [system.name for system in results.key.systems]
    rows = []
    for index, name in enumerate(names):
        found = [results.strengths[question].systems[index] for question in questions]
        rows.append([tex(name), *(tex(_signed(e)) for e in found)])
    pairs = dict.fromkeys((p.first, p.second) for p in results.preferences)
    by_place = {(p.first, p.second, p.question): p.rate for p in results.preferences}
    shares = [
        [
            tex(f"{names[a]} over {names[b]}"),
            *(tex(percent(by_place.get((a, b, question)))) for question in questions),
        ]
        for a, b in pairs
    ]
    heads = [tex(question) for question in questions]
    kept, answers = len(results.kept), len(results.observations)
    lines = [
        f"% {kept} raters ({len(results.excluded)} excluded), {len(results.key.prompts)} prompts, {answers} answers.",
        "% \\usepackage{booktabs}",
        "% Bradley-Terry strengths with ties (Davidson), bootstrap over raters and prompts.",
        *tabular(heads, [rows]),
        "",
        "% Share of preferences in %, a tie counting half; crossed random effects of rater and prompt.",
        *tabular(heads, [shares]),
    ]
    return "\n".join(lines) + "\n"


def percent(rate: Rate | None) -> str:
    """Format a rate in per cent with its interval."""
    if rate is None:
        return "--"
    ends = f" [{100 * rate.low:.0f}, {100 * rate.high:.0f}]" if rate.known else ""
    return f"{100 * rate.mean:.0f}{ends}"


def _signed(e: Estimate) -> str:
    ends = f" [{e.low:+.2f}, {e.high:+.2f}]" if e.known else ""
    return f"{e.mean:+.2f}{ends}".replace("-", MINUS)
