"""The tables as CSV (every value in full) and as LaTeX (booktabs; values rounded as in the page)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from dit_booth.report.contrasts import Contrasts
from dit_booth.report.measures import Measure
from dit_booth.report.study import COSTS
from dit_booth.report.svg import DASH, MINUS
from dit_booth.report.table import ResultRow, Table
from dit_booth.study.statistics import CrossedEstimate, Estimate

_TEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    MINUS: "$-$",
    DASH: "--",
    "∞": r"$\infty$",
    "Δ": r"$\Delta$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "*": r"$^*$",
    "\n": " ",
}


def to_csv(table: Table) -> str:
    """Return a CSV line per row: means, differences, their intervals, and costs; unknown cells are empty.

    Floors and ceilings have the status ``control``.
    """
    costs = [name for name in COSTS if any(name in row.costs for row in table.rows)]
    header = ["variant", "status", "baseline", "seeds", "prompts"]
    for m in table.metrics:
        header += [m.name, *(f"{m.name}_{end}" for end in ("low", "high", "df", "over"))]
    for m in table.metrics if table.others else ():
        header += [f"{m.name}_difference", *(f"{m.name}_difference_{end}" for end in _DIFFERENCE)]
    header += costs
    empty = [""] * (len(header) - 5)
    absent = [[group.label, group.status, "0", "0", "0", *empty] for group in table.absent]
    rows, floors = ([_csv_row(table, row, costs) for row in part] for part in (table.rows, table.controls))
    return csv_text([header, *rows, *absent, *floors])


_DIFFERENCE = ("low", "high", "df", "p", "seeds_low", "seeds_high", "prompts_low", "prompts_high")


def _csv_row(table: Table, row: ResultRow, costs: Sequence[str]) -> list[str]:
    status = row.group.status if row.group else "control"
    cells = [row.label, status, str(int(row is table.baseline)), str(len(row.points)), row.prompts]
    for m in table.metrics:
        found = row.quality.get(m.name)
        e = found.main if found else None
        cells += [*map(_number, (e.mean, e.low, e.high, e.df)), e.over] if e else [""] * 5
    for m in table.metrics if table.others else ():
        cells += _csv_difference(row.differences.get(m.name))
    return cells + [_number(row.costs.get(name, math.nan)) for name in costs]


def _csv_difference(d: CrossedEstimate | None) -> list[str]:
    """Return a difference, its interval, degrees of freedom and p-value, and the intervals of the diagnostics."""
    if d is None:
        return [""] * (1 + len(_DIFFERENCE))
    ends = [[_number(e.low), _number(e.high)] if e else ["", ""] for e in (d.main, d.by_seed, d.by_prompt)]
    return [_number(d.mean), *ends[0], _number(d.main.df), _number(d.main.p), *ends[1], *ends[2]]


def contrasts_to_csv(contrasts: Contrasts) -> str:
    """Return a CSV line per primary contrast, with p-values as tested and after Holm's correction."""
    header = ["variant", "minus", "metric", "seeds", "prompts", "difference", *_DIFFERENCE]
    header += ["p_holm", "margin", "p_holm_not_worse", "p_holm_equivalent", "verdict"]
    lines = []
    for c in contrasts.results:
        d = c.difference
        cells = [
            c.ours,
            c.theirs,
            contrasts.metric.name,
            str(d.seeds if d else 0),
            str(d.prompts if d else 0),
        ]
        cells += [
            *_csv_difference(d),
            _number(c.p),
            "" if contrasts.margin is None else repr(contrasts.margin),
        ]
        lines.append([*cells, _number(c.p_margin), _number(c.p_equivalent), c.verdict])
    return csv_text([header, *lines])


def csv_text(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def to_latex(table: Table, notes: Sequence[str] = ()) -> str:
    """Return booktabs tables: results, differences to the baseline, primary contrasts; `notes` become comments."""
    columns = [*table.metrics, *table.costs]
    if not table.rows:
        return "\n".join(f"% {' '.join(note.split())}" for note in notes) + "\n"
    lines = [*(f"% {' '.join(note.split())}" for note in notes), "% \\usepackage{booktabs}"]
    absent = [[f"{_first(group.label)} ({group.status})", *["--"] * len(columns)] for group in table.absent]
    groups = [[*(_result_cells(table, row) for row in table.rows), *absent]]
    groups += [[_result_cells(table, row) for row in table.controls]] if table.controls else []
    lines += tabular([_head(m) for m in columns], groups)
    if table.baseline and table.others:
        lines += [
            "",
            f"% Differences to {' '.join(table.baseline.label.split())}, paired by seed and prompt.",
        ]
        rows = [_difference_cells(table, row) for row in table.others]
        lines += tabular([_head(m) for m in table.metrics], [rows])
    if table.contrasts is not None:
        metric = table.contrasts.metric
        lines += ["", "% Primary contrasts; p after Holm's correction."]
        lines += tabular([_head(metric), "$p$", "conclusion"], [_contrast_rows(table.contrasts)])
    return "\n".join(lines) + "\n"


def _contrast_rows(contrasts: Contrasts) -> list[list[str]]:
    rows = []
    for c in contrasts.results:
        value = "--" if c.difference is None else _interval(contrasts.metric, c.difference.main, c.mark)
        p = "--" if c.exploratory or math.isnan(c.p) else tex(p_text(c.p))
        rows.append([_first(f"{c.ours} {MINUS} {c.theirs}"), value, p, tex(c.verdict)])
    return rows


def p_text(p: float) -> str:
    """Format a p-value: ``0.013``, ``<0.001``; a dash if unknown."""
    if math.isnan(p):
        return DASH
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def tabular(heads: Sequence[str], groups: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Return a table whose groups of rows are separated by rules."""
    body = [line for group in groups for line in (r"\midrule", *(" & ".join(row) + r" \\" for row in group))]
    return [
        f"\\begin{{tabular}}{{l{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["", *heads]).strip() + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _head(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return tex(f"{measure.label}{unit}{' ' + measure.arrow if measure.arrow else ''}")


def _result_cells(table: Table, row: ResultRow) -> list[str]:
    cells = [_first(row.label)]
    for m in table.metrics:
        e = row.quality.get(m.name)
        if e is None:
            cells.append("--")
            continue
        mean = tex(m.text(e.mean))
        mean = rf"\textbf{{{mean}}}" if row.id in table.best(m) else mean
        half = e.main.half
        cells.append(mean if math.isnan(half) else rf"{mean} {{\scriptsize $\pm$ {tex(m.text(half))}}}")
    return cells + [tex(m.text(row.costs.get(m.name, math.nan))) for m in table.costs]


def _difference_cells(table: Table, row: ResultRow) -> list[str]:
    cells = [_first(row.label)]
    for m in table.metrics:
        d = row.differences.get(m.name)
        cells.append("--" if d is None else _interval(m, d.main, table.mark(row, m)))
    return cells


def _interval(measure: Measure, e: Estimate, mark: str) -> str:
    """Format a difference with its mark and its interval."""
    ends = "" if math.isnan(e.half) else f" [{measure.signed(e.low)}, {measure.signed(e.high)}]"
    return tex(f"{measure.signed(e.mean)}{mark}{ends}")


def _first(label: str) -> str:
    """Return a row's label, safe at the start of a line: a bracket would be an option of the line before."""
    text = tex(label)
    return f"{{}}{text}" if text.startswith(("[", "$^*$")) else text


def tex(text: str) -> str:
    """Escape characters that are special in LaTeX."""
    return "".join(_TEX.get(c, c) for c in text)
