"""The power analysis as one self-contained page: detectable preference over raters, for several numbers of prompts."""

from __future__ import annotations

import math
from dataclasses import replace

from markupsafe import Markup

from dit_booth.human.plots import Curve, curve_plot
from dit_booth.human.power import Plan, detectable
from dit_booth.human.texts import ASSETS
from dit_booth.report.template import render, style

RATERS = (5, 8, 12, 16, 20, 30, 40, 60, 80, 100)


def power_table(plan: Plan) -> tuple[list[int], list[tuple[int, list[float]]]]:
    """Return numbers of prompts, and for each number of raters the detectable shares; a rater sees no pair twice."""
    counts = {plan.prompts // 2, plan.prompts, 2 * plan.prompts, 4 * plan.prompts}
    prompts = sorted(count for count in counts if count >= plan.least_prompts)
    plans = [replace(plan, prompts=p, pairs=min(plan.pairs, plan.cells * p // plan.prompts)) for p in prompts]
    return prompts, [(r, [detectable(replace(own, raters=r)).share for own in plans]) for r in RATERS]


def make_power_page(plan: Plan) -> str:
    """Render the page."""
    prompts, rows = power_table(plan)
    curves = [
        Curve(
            label=f"{count} prompts",
            points=[(raters, shares[column]) for raters, shares in rows if math.isfinite(shares[column])],
            style=column + 1,
        )
        for column, count in enumerate(prompts)
    ]
    curves = [curve for curve in curves if curve.points]
    top = min(1.0, max((value for curve in curves for _, value in curve.points), default=1.0) + 0.02)
    plot = (
        curve_plot(curves, "raters", "detectable share of preferences", low=0.5, high=top)
        if curves
        else Markup("")
    )
    return render(
        (ASSETS / "power.html").read_text(), plan=plan, columns=prompts, rows=rows, plot=plot, css=style()
    )
