"""The results of a human study as one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from markupsafe import Markup

from dit_booth.human.analyse import Results
from dit_booth.human.export import percent
from dit_booth.human.plots import Bar, interval_plot
from dit_booth.human.texts import ASSETS
from dit_booth.report.svg import DASH, MINUS
from dit_booth.report.template import render, style

_FEW_RATERS, _FEW_PROMPTS, _WEAK_ALPHA = 10, 8, 0.2


def make_result_page(results: Results) -> str:
    """Render the page."""
    return render(
        (ASSETS / "result.html").read_text(),
        {"percent": percent, "signed": _signed, "file_name": lambda where: Path(where).name},
        r=results,
        names=[system.name for system in results.key.systems],
        plots=list(_plots(results)),
        accuracy=_accuracy_plots(results),
        caveats=list(_caveats(results)),
        complete=sum(one.rater.complete(results.key) for one in results.kept),
        isnan=math.isnan,
        css=style(),
    )


def _plots(results: Results) -> Iterator[tuple[str, Markup, Markup]]:
    """Iterate over (question, plot of strengths, plot of preferences); all questions have the same axes."""
    names = [system.name for system in results.key.systems]
    found = [e for strengths in results.strengths.values() for e in strengths.systems]
    reach = max(abs(v) for e in found for v in (e.mean, e.low, e.high) if math.isfinite(v)) * 1.05 or 1.0
    for question, strengths in results.strengths.items():
        bars = [
            Bar(label=name, mean=e.mean, low=e.low, high=e.high, style=number)
            for number, (name, e) in enumerate(zip(names, strengths.systems, strict=True))
        ]
        bars.sort(key=lambda bar: -bar.mean)
        first = interval_plot(bars, f"strength: {question}", low=-reach, high=reach, middle=0)
        shares = [
            Bar(
                label=f"{names[p.first]} over {names[p.second]}",
                mean=p.rate.mean,
                low=p.rate.low,
                high=p.rate.high,
            )
            for p in results.preferences
            if p.question == question
        ]
        yield question, first, interval_plot(shares, f"preferred: {question}", low=0, high=1, middle=0.5)


def _accuracy_plots(results: Results) -> list[Markup]:
    """Return a plot for each question for which metrics are known, the best metric first."""
    out = []
    for question in results.strengths:
        found = [a for a in results.accuracies if a.question == question]
        if len(found) > 1:
            found[1:] = sorted(found[1:], key=lambda a: -a.rate.mean)
            bars = [
                Bar(label=a.label, mean=a.rate.mean, low=a.rate.low, high=a.rate.high, style=int(number > 0))
                for number, a in enumerate(found)
            ]
            out.append(
                interval_plot(bars, f"share of answers predicted: {question}", low=0, high=1, middle=0.5)
            )
    return out


def _caveats(results: Results) -> Iterator[str]:
    raters, prompts = len(results.kept), len({o.prompt for o in results.observations})
    if raters < _FEW_RATERS:
        yield f"Only {raters} raters: intervals are wide, and depend on the model."
    if prompts < _FEW_PROMPTS:
        yield f"Only {prompts} prompts: the results hold for these, and hardly for others."
    if len(results.excluded) > 0.2 * len(results.checked):
        yield f"{len(results.excluded)} of {len(results.checked)} raters are excluded: were the instructions clear?"
    if results.side and results.side.known and not results.side.low <= 0.5 <= results.side.high:
        side = "right" if results.side.mean > 0.5 else "left"
        yield (
            f"Raters lean to the {side} side: {percent(results.side)} % of answers go to the right. Sides are balanced,"
            " so this weakens differences and does not shift them."
        )
    weak = [question for question, alpha in results.alphas.items() if alpha.value < _WEAK_ALPHA]
    if weak:
        yield f"Raters agree little about {', '.join(weak)}."
    if refused := len(results.collected.refused):
        yield (
            f"{refused} files or lines were refused; see below."
            if refused > 1
            else "A file was refused; see below."
        )
    yield (
        f"{len(results.preferences)} preferences are shown without correction for their number: about one in twenty"
        " intervals misses."
    )


def _signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS) if math.isfinite(value) else DASH
