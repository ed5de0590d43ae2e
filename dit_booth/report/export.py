"""The table as CSV (every value in full) and as LaTeX (booktabs; values rounded as in the page)."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from dit_booth.report.study import COSTS, Group
from dit_booth.report.svg import DASH, MINUS
from dit_booth.report.table import Measure, ResultRow, Table

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
    """Return a CSV line per variant: means, differences, their intervals, and costs; unknown cells are empty."""
    costs = [name for name in COSTS if any(name in row.costs for row in table.rows)]
    header = ["variant", "status", "baseline", "seeds", "prompts"]
    for m in table.metrics:
        header += [m.name, f"{m.name}_low", f"{m.name}_high", f"{m.name}_n", f"{m.name}_over"]
    for m in table.metrics if table.others else ():
        header += [f"{m.name}_difference"]
        header += [
            f"{m.name}_difference_{over}_{end}" for over in ("seeds", "prompts") for end in ("low", "high")
        ]
    header += costs
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        writer.writerow(_csv_row(table, row, costs))
    for group in table.absent:
        writer.writerow([group.label, group.status, "0", "0", "0", *[""] * (len(header) - 5)])
    return out.getvalue()


def _csv_row(table: Table, row: ResultRow, costs: Sequence[str]) -> list[str]:
    cells = [row.group.label, row.group.status, str(int(row is table.baseline))]
    cells += [str(len(row.group.finished)), row.prompts]
    for m in table.metrics:
        e = row.quality.get(m.name)
        cells += [*map(_number, (e.mean, e.low, e.high)), str(e.n), e.over] if e else [""] * 5
    for m in table.metrics if table.others else ():
        d = row.differences.get(m.name)
        cells += [_number(d.mean) if d else ""]
        for e in (d.seeds, d.prompts) if d else (None, None):
            cells += [_number(e.low), _number(e.high)] if e else ["", ""]
    return cells + [_number(row.costs.get(name, math.nan)) for name in costs]


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def to_latex(table: Table, notes: Sequence[str] = ()) -> str:
    """Return two booktabs tables, results and differences to the baseline; `notes` become comments at the top."""
    columns = [*table.metrics, *table.costs]
    if not table.rows:
        return "\n".join(f"% {' '.join(note.split())}" for note in notes) + "\n"
    lines = [*(f"% {' '.join(note.split())}" for note in notes), "% \\usepackage{booktabs}"]
    absent = [[f"{_first(group)} ({group.status})", *["--"] * len(columns)] for group in table.absent]
    lines += _tabular(
        [_head(m) for m in columns], [*(_result_cells(table, row) for row in table.rows), *absent]
    )
    if table.baseline and table.others:
        lines += [
            "",
            f"% Differences to {' '.join(table.baseline.group.label.split())}, paired by seed and prompt.",
        ]
        lines += _tabular(
            [_head(m) for m in table.metrics], [_difference_cells(table, row) for row in table.others]
        )
    return "\n".join(lines) + "\n"


def _tabular(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"\\begin{{tabular}}{{l{'r' * len(heads)}}}",
        r"\toprule",
        " & ".join(["", *heads]).strip() + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _head(measure: Measure) -> str:
    unit = f" ({measure.unit})" if measure.unit else ""
    return tex(f"{measure.label}{unit}{' ' + measure.arrow if measure.arrow else ''}")


def _result_cells(table: Table, row: ResultRow) -> list[str]:
    cells = [_first(row.group)]
    for m in table.metrics:
        e = row.quality.get(m.name)
        if e is None:
            cells.append("--")
            continue
        mean = tex(m.text(e.mean))
        mean = rf"\textbf{{{mean}}}" if row.group.id in table.best(m) else mean
        cells.append(mean if math.isnan(e.half) else rf"{mean} {{\scriptsize $\pm$ {tex(m.text(e.half))}}}")
    return cells + [tex(m.text(row.costs.get(m.name, math.nan))) for m in table.costs]


def _difference_cells(table: Table, row: ResultRow) -> list[str]:
    cells = [_first(row.group)]
    for m in table.metrics:
        d = row.differences.get(m.name)
        if d is None:
            cells.append("--")
            continue
        ends = "" if math.isnan(d.main.half) else f" [{m.signed(d.main.low)}, {m.signed(d.main.high)}]"
        cells.append(tex(f"{m.signed(d.mean)}{d.mark}{ends}"))
    return cells


def _first(group: Group) -> str:
    """Return a row's label, safe at the start of a line: a bracket would be an option of the line before."""
    label = tex(group.label)
    return f"{{}}{label}" if label.startswith(("[", "$^*$")) else label


def tex(text: str) -> str:
    """Escape characters that are special in LaTeX."""
    return "".join(_TEX.get(c, c) for c in text)
