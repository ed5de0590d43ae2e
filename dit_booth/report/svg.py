"""Small pieces of inline SVG: escaped elements, axes with round ticks, markers that differ in shape too.

Colours are the style sheet's: a mark of style `i` has the classes of `classes(i)`, so light and dark pages differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 7  # of the style sheet's palette: --c0 (the baseline's) to --c6
SHAPES = 6
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def element(name: str, *children: str, **attributes: str | float) -> Markup:
    """Make ``element("g", child, class_="a")``; `_` at the end goes, other `_` become `-`; all text is escaped."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{v:.1f}" if isinstance(v, float) else v)}"'
        for key, v in attributes.items()
    )
    return Markup(f"<{name}{written}>{''.join(escape(child) for child in children)}</{name}>")


def classes(style: int) -> str:
    """Return a style's CSS classes: its color, and its dash pattern where colors repeat."""
    return f"c{style % COLOURS} d{style // COLOURS % 3}"


def marker(style: int, x: float, y: float, r: float = 5.0) -> Markup:
    """Draw a row's marker; styles differ in shape and color."""
    corners: dict[int, list[tuple[float, float]]] = {
        1: [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        2: [(0, -1.25), (1.2, 0.95), (-1.2, 0.95)],
        3: [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)],
        4: [(0, 1.25), (1.2, -0.95), (-1.2, -0.95)],
        5: [(-.4, -1.3), (.4, -1.3), (.4, -.4), (1.3, -.4), (1.3, .4), (.4, .4), (.4, 1.3), (-.4, 1.3), (-.4, .4),
            (-1.3, .4), (-1.3, -.4), (-.4, -.4)],
    }  # fmt: skip
    shape, scale = style % SHAPES, r * 0.9
    if shape == 0:
        return element("circle", cx=x, cy=y, r=r, class_=f"mark {classes(style)}")
    points = " ".join(f"{x + scale * a:.1f},{y + scale * b:.1f}" for a, b in corners[shape])
    return element("polygon", points=points, class_=f"mark {classes(style)}")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A map from values `low` to `high` to pixels `start` to `end`; logarithmic if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Return round values inside the axis: decades and their 1, 2, 5, or multiples of 1, 2, 2.5, 5 x 10^k."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [base * 10.0**d for d in decades for base in (1, 2, 5)]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            if len(inside) > about + 3:
                inside = [mark for mark in inside if math.isclose(math.log10(mark) % 1, 0, abs_tol=1e-9)]
            if len(inside) > 1:
                return inside
        step = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(step))
        step = next(base * power for base in (1, 2, 2.5, 5, 10) if base * power >= step * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def labelled_ticks(self, scale: float = 1.0) -> list[tuple[float, str]]:
        """Return ticks with labels in units of `scale` (0: each with its own SI prefix).

        All have the same number of decimals, unless they are decades apart.
        """
        ticks = self.ticks()
        if not scale:
            return [(value, with_prefix(value)) for value in ticks]
        short = [f"{value / scale:.6g}" for value in ticks]
        near = not self.log or ticks[-1] < 10 * ticks[0]
        if near and not any("e" in text for text in short):
            decimals = max((len(text.partition(".")[2]) for text in short), default=0)
            short = [f"{value / scale:.{decimals}f}" for value in ticks]
        return [(value, text.replace("-", MINUS)) for value, text in zip(ticks, short, strict=True)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Return the ends of a linear axis around `values`."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * 0.1 or 1.0
    return low - room, high + room


def padded_log(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Return the ends of a logarithmic axis around `values`."""
    low, high = padded([math.log(value) for value in values], share)
    return math.exp(low), math.exp(high)


def frame(
    x: Axis, y: Axis, x_label: str, y_label: str, x_scale: float = 1.0, *, whole: bool = False
) -> Markup:
    """Draw grid lines, ticks with labels (x in units of `x_scale`, or `whole` numbers), and both axes' titles."""
    left, bottom, right, top = x.start, y.start, x.end, y.end
    parts = []
    for value, text in y.labelled_ticks():
        parts.append(element("line", x1=left, x2=right, y1=y(value), y2=y(value), class_="grid"))
        parts.append(element("text", text, x=left - 7, y=y(value) + 4, text_anchor="end"))
    ticks = x.labelled_ticks(x_scale)
    for value, text in ((v, f"{v:.0f}") for v, _ in ticks if v == round(v)) if whole else ticks:
        parts.append(element("line", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4, class_="tick"))
        parts.append(element("text", text, x=x(value), y=bottom + 18, text_anchor="middle"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(
        element("text", x_label, x=(left + right) / 2, y=bottom + 37, text_anchor="middle", class_="label")
    )
    parts.append(element("text", y_label, x=2.0, y=top - 12, class_="label"))
    return Markup("").join(parts)


def si_prefix(value: float) -> tuple[float, str]:
    """Return the largest SI prefix at which a count is at least 1: 1.3e6 -> (1e6, "M")."""
    prefixes = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next((prefix for prefix in prefixes if value >= prefix[0]), (1.0, ""))


def with_prefix(value: float) -> str:
    """Format a value with three digits and an SI prefix: ``40``, ``1.26 k``, ``15.9 M``."""
    scale, prefix = si_prefix(value)
    return f"{value / scale:.3g} {prefix}".rstrip()


def text_width(text: str, size: float = 12.0) -> float:
    """Estimate the width of a text in the page's sans serif, in pixels."""
    return 0.56 * size * len(text)
