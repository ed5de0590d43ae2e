"""Plots of a human study, as inline SVG: intervals side by side, and curves of the power analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dit_booth.report.svg import Axis, classes, element, frame, marker, text_width

_ROW, _TOP, _WIDTH = 24.0, 30.0, 620.0


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A value with its interval (NaN: unknown), drawn in one line."""

    label: str
    mean: float
    low: float
    high: float
    style: int = 1


def interval_plot(bars: Sequence[Bar], title: str, *, low: float, high: float, middle: float) -> Markup:
    """Draw bars below each other over an axis from `low` to `high`, with a dashed line at `middle`."""
    labels = min(260.0, max(text_width(bar.label) for bar in bars) + 14)
    x = Axis(low=low, high=high, start=labels, end=_WIDTH - 14)
    bottom = _TOP + _ROW * len(bars)
    parts = [element("text", title, x=x.start, y=_TOP - 12, class_="label")]
    for value, text in x.labelled_ticks():
        parts.append(element("line", x1=x(value), x2=x(value), y1=_TOP, y2=bottom, class_="grid"))
        parts.append(element("text", text, x=x(value), y=bottom + 17, text_anchor="middle"))
    parts.append(element("line", x1=x(middle), x2=x(middle), y1=_TOP, y2=bottom, class_="truth"))
    for number, bar in enumerate(bars):
        y = _TOP + _ROW * (number + 0.5)
        body = [element("text", bar.label, x=x.start - 9, y=y + 4, text_anchor="end", class_="name")]
        if math.isfinite(bar.low):
            ends = (max(low, bar.low), min(high, bar.high))
            body += [
                element("line", x1=x(ends[0]), x2=x(ends[1]), y1=y, y2=y, class_=f"bar {classes(bar.style)}")
            ]
        body += [marker(bar.style, x(min(high, max(low, bar.mean))), y)]
        parts.append(element("g", *body))
    view = f"0 0 {_WIDTH:.0f} {bottom + 26:.0f}"
    return element("svg", *parts, viewBox=view, role="img", aria_label=title, class_="plot")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of a curve, from left to right."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int


def curve_plot(curves: Sequence[Curve], x_label: str, y_label: str, *, low: float, high: float) -> Markup:
    """Draw curves with their names at the right end."""
    xs = [at for curve in curves for at, _ in curve.points]
    x = Axis(low=min(xs), high=max(xs), start=58, end=470)
    y = Axis(low=low, high=high, start=250, end=34)
    parts = [frame(x, y, x_label, y_label, whole=True)]
    last = -math.inf
    for curve in sorted(curves, key=lambda curve: -curve.points[-1][1]):
        line = " L".join(f"{x(at):.1f},{y(value):.1f}" for at, value in curve.points)
        last = max(last + 14, y(curve.points[-1][1]) + 4)
        name = element("text", curve.label, x=x.end + 8, y=last, class_="name")
        parts.append(element("g", element("path", d=f"M{line}", class_=f"line {classes(curve.style)}"), name))
    title = f"{y_label} against {x_label}"
    return element("svg", *parts, viewBox="0 0 620 296", role="img", aria_label=title, class_="plot")
