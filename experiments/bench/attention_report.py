"""Write the measurements of `experiments.bench.attention` as a Markdown page, a plot and a log line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Row = dict[str, Any]


def line(rows: Sequence[Row]) -> str:
    """Format a case as one line: every competitor's time and peak memory."""
    case = rows[0]
    parts = (
        f"{r['what']} {r['best_ms']:.1f} ms {r['peak_mib']:.0f} MiB" for r in rows if r["pass"] != "forward"
    )
    return "{plan} F={frames} N={tokens} image={image} d={head}: ".format(**case) + ", ".join(parts)


# ---- the page ----------------------------------------------------------------------------------------------


def page(rows: Sequence[Row], frames: Sequence[Row], about: Row, command: str) -> str:
    """The Markdown page: the bars, the cost in frames, the grid."""
    parts = [
        "# Cross-frame attention: segments against concatenation",
        f"Repeat with `{command}`.",
        "Conditions: "
        + ", ".join(f"{key} {value}" for key, value in about.items())
        + ". Times are the best over rounds that alternate between the competitors; `segments / row` is the median over"
        " the rounds of the time of `segments` divided by that of the row. Memory is the peak allocated beyond the"
        " inputs, including results. FLOP/s count the visible scores only, and 2.5 times as many backward as forward.",
        "## The main case",
        _table(_case(rows[0], rows), about),
        _bars(_case(rows[0], rows)),
        "## Cost in frames",
        "Time per frame of `attend` with an image segment as large as a frame, for 16 and 128 frames. Frames at the"
        " start of a video read fewer frames, so the FLOPs per frame increase with length: `work` is their growth.",
        _markdown(
            ["plan", "pass", "ms per frame, F=16", "F=128", "growth", "work"],
            [
                [
                    r["plan"],
                    r["pass"],
                    r["ms_per_frame_16"],
                    r["ms_per_frame_128"],
                    *map(_percent, _growth(r)),
                ]
                for r in frames
            ],
        ),
        "## All cases",
        _table(rows, about),
    ]
    return "\n\n".join(parts) + "\n"


def _growth(row: Row) -> tuple[float, float]:
    return row["growth"], row["growth_of_work"]


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}%"


def _case(like: Row, rows: Sequence[Row]) -> list[Row]:
    keys = ("plan", "frames", "tokens", "image", "head", "heads")
    return [row for row in rows if all(row[key] == like[key] for key in keys)]


def _bars(rows: Sequence[Row]) -> str:
    """Time and memory of segments as shares of cat+repeat's, and FLOP/s as a share of the kernel's own."""
    at = {(row["pass"], row["what"]): row for row in rows}
    lines = []
    for name in ("forward", "forward+backward"):
        ours = at[name, "segments"]
        for other in ("cat+repeat", "cat+repeat by flash"):
            if (theirs := at.get((name, other))) is not None:
                lines.append(
                    f"- {name}: {theirs['segments_over_it']:.2f}x the time of {other},"
                    f" {ours['peak_mib'] / theirs['peak_mib']:.2f}x its memory"
                )
        if (alone := at.get((name, "plain"))) is not None:
            lines.append(
                f"- {name}: {ours['gflops'] / alone['gflops']:.0%} of the FLOP/s of the same kernel on contiguous keys"
                " (`plain`)"
            )
    return "\n".join(lines)


def _table(rows: Sequence[Row], about: Row) -> str:
    head = [
        "plan",
        "F",
        "N",
        "image",
        "d",
        "heads",
        "pass",
        "method",
        "best ms",
        "segments / row",
        "peak MiB",
    ]
    keys = [
        "plan",
        "frames",
        "tokens",
        "image",
        "head",
        "heads",
        "pass",
        "what",
        "best_ms",
        "segments_over_it",
    ]
    keys += ["peak_mib", "gflops", "share_of_matmul"]
    return _markdown([*head, "GFLOP/s", "of matmul"], [[row[key] for key in keys] for row in rows])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


# ---- the plot ----------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], frames: Sequence[Row], path: Path) -> None:
    """Time and memory over segments' for `first+previous` with an image, and time per frame; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        log.warning("no plot: matplotlib is not installed; run `pip install -e .[bench]`")
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chosen = [
        r
        for r in rows
        if r["plan"] == "first+previous" and r["image"] == r["tokens"] and r["pass"] != "forward"
    ]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    if chosen:
        _relative(axes[0], chosen, "best_ms", "time / segments' time")
        _relative(axes[1], chosen, "peak_mib", "peak memory / segments'")
    for row in frames:
        if row["pass"] != "forward":
            both = [row["ms_per_frame_16"], row["ms_per_frame_128"]]
            axes[2].plot([16, 128], both, marker="o", label=row["plan"])
    axes[2].set(xlabel="frames", ylabel="ms per frame, forward+backward", xscale="log", ylim=(0, None))
    axes[2].set_xticks([16, 128], ["16", "128"])
    axes[2].minorticks_off()
    if frames:
        axes[2].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _relative(axis: Any, rows: Sequence[Row], key: str, label: str) -> None:
    cases = sorted({(r["frames"], r["tokens"], r["head"]) for r in rows})
    names = [name for name in dict.fromkeys(r["what"] for r in rows) if name != "segments"]
    at = {(r["what"], r["frames"], r["tokens"], r["head"]): r[key] for r in rows}
    width = 0.8 / max(1, len(names))
    for j, name in enumerate(names):
        ratios = [at.get((name, *case), float("nan")) / at["segments", *case] for case in cases]
        axis.bar([i + j * width for i in range(len(cases))], ratios, width, label=name)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(cases))],
        [f"F={f}\nN={n}\nd={d}" for f, n, d in cases],
        fontsize=7,
    )
    axis.set(ylabel=label, title="first+previous, image of N tokens", yscale="log")
    low, high = axis.get_ylim()
    ticks = [2.0**k for k in range(-4, 12) if low <= 2.0**k <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=7)
