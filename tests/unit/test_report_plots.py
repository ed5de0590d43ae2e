"""The report's plots: round ticks, what is drawn where, and names that do not cover anything."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from sweep_folder import read_rows, write_lines, write_rows, write_sweep

from dit_booth.report.curves import drift_plots, scatter_plots
from dit_booth.report.plots import _smooth, loss_plots, quality_plots
from dit_booth.report.read import read_study
from dit_booth.report.svg import Axis, element, marker, text_width, with_prefix
from dit_booth.report.table import make_table
from dit_booth.report.values import frames_of, values_of

torch.set_num_threads(1)


def axis(low: float, high: float, *, log: bool = False) -> Axis:
    return Axis(low=low, high=high, start=0, end=100, log=log)


def test_an_axis_places_its_ends_and_its_middle():
    assert [axis(2, 6)(v) for v in (2, 4, 6)] == [0, 50, 100]
    assert [axis(1, 100, log=True)(v) for v in (1, 10, 100)] == pytest.approx([0, 50, 100])


@pytest.mark.parametrize(
    ("low", "high", "log", "texts"),
    [
        (0, 10, False, ["0", "2", "4", "6", "8", "10"]),
        (-1.5, 1.5, False, ["\N{MINUS SIGN}1", "0", "1"]),
        (0.0795, 0.111, False, ["0.08", "0.09", "0.10", "0.11"]),  # equally many decimals
        (3, 250, True, ["5", "10", "20", "50", "100", "200"]),
        (2e-5, 30, True, ["0.0001", "0.001", "0.01", "0.1", "1", "10"]),
        (11, 13, True, ["11.0", "11.5", "12.0", "12.5", "13.0"]),
    ],
)
def test_ticks_are_round(low: float, high: float, log: bool, texts: list[str]):
    found = [text for _, text in axis(low, high, log=log).labelled_ticks()]
    assert found == texts


def test_numbers_with_a_prefix():
    assert [with_prefix(v) for v in (0, 40, 1260, 15.92e6, 4.2e13)] == ["0", "40", "1.26 k", "15.9 M", "42 T"]


def test_what_is_written_into_a_drawing_is_escaped():
    drawn = element("text", "<b>&", x=1.25, class_="a", data_tip='"quoted" <x>')
    assert drawn == '<text x="1.2" class="a" data-tip="&#34;quoted&#34; &lt;x&gt;">&lt;b&gt;&amp;</text>'
    assert len({re.sub(r" class=.*", "", marker(style, 0, 0)) for style in range(6)}) == 6


def test_smoothing_is_the_mean_of_what_there_is():
    values = np.array([0.0, 3.0, 6.0, 9.0, 12.0])
    assert _smooth(values, 3) == pytest.approx([1.5, 3, 6, 9, 10.5])
    assert _smooth(values, 1) == pytest.approx(values)


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Where the names in a plot are."""
    out = []
    for x, y, anchor, text in re.findall(
        r'<text x="([^"]*)" y="([^"]*)" text-anchor="(\w+)" class="name">([^<]*)', svg
    ):
        width = text_width(text)
        left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
        out.append((left, float(y) - 10, left + width, float(y) + 3))
    return out


@pytest.mark.parametrize(
    "costs", [[1.0] * 9, [1.0, 1.01, 1.02, 1.5, 1.5, 2, 2.1, 3, 3], [10.0**i for i in range(9)]]
)
def test_names_cover_nothing_and_stay_inside(tmp_path: Path, costs: list[float]):
    names = [f"variant {i} with a long name" if i % 2 else f"v{i}" for i in range(9)]
    palettes = {(name, seed): [10.0 + i % 3, 11.0 + seed] for i, name in enumerate(names) for seed in (0, 1)}
    folder = write_sweep(tmp_path, palettes, samples=False)
    rows = read_rows(folder)
    write_rows(folder, [row | {"trained_parameters": costs[int(row["group"][1:])] * 1e5} for row in rows])
    study = read_study([folder])
    styles = {group.id: i for i, group in enumerate(study.groups)}
    plot = next(p for p in quality_plots(make_table(study), styles) if p.key == "palette/trained_parameters")
    assert plot.svg.count("data-tip") == 9
    found = boxes(plot.svg)
    assert found
    for a, b in combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    marks = re.findall(r'<circle cx="([^"]*)" cy="([^"]*)" r="5.0"', plot.svg)
    for x, y in ((float(x), float(y)) for x, y in marks):
        assert 62 <= x <= 600 and 34 <= y <= 310
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for a in found)
    assert all(a[0] >= 0 and a[2] <= 620 for a in found)
    assert len({x for x, _ in marks}) == len(marks)  # equal costs stand side by side


def test_wide_intervals_do_not_hide_the_differences(tmp_path: Path):
    near = {("a", 0): [10.0, 10.0], ("a", 1): [11.0, 11.0], ("b", 0): [11.5, 11.5], ("b", 1): [12.5, 12.5]}
    study = read_study([write_sweep(tmp_path, near, samples=False)])
    plot = quality_plots(make_table(study), {"g0": 0, "g1": 1})[0]
    assert "Arrow heads" in plot.note
    assert plot.svg.count("<path") == 4


def levels(svg: str) -> list[str]:
    """The names of the floors and ceilings that are drawn."""
    return re.findall(r'class="faint">([^<]*)', svg)


def test_floors_and_the_ground_truth_are_lines_where_they_fit(tmp_path: Path):
    far = {("a", 0): [40.0, 1.0], ("b", 0): [1.0, 1.2], ("c", 0): [30.0, 20.0]}
    study = read_study([write_sweep(tmp_path / "far", far, samples=False)])
    plot = quality_plots(make_table(study), {"g0": 0, "g1": 1, "g2": 2})[0]
    assert levels(plot.svg) == ["ground truth"]
    assert "Outside the frame: shuffled image 40.50, no image 50.50." in plot.note
    near = {("a", 0): [40.0, 41.0], ("b", 0): [42.0, 41.2]}
    study = read_study([write_sweep(tmp_path / "near", near, samples=False)])
    plot = quality_plots(make_table(study), {"g0": 0, "g1": 1})[0]
    assert levels(plot.svg) == []
    assert "Outside the frame: ground truth 1.50, shuffled image 60.50, no image 70.50." in plot.note


# ---- drift and prompts -----------------------------------------------------------------------------------------


def test_a_drift_plot_has_the_mean_of_each_frame(tmp_path: Path):
    study = read_study(
        [write_sweep(tmp_path, {("a", 0): [10.0, 20.0], ("a", 1): [14.0, 24.0]}, samples=False)]
    )
    (plot,) = drift_plots(make_table(study), {"g0": 0})
    assert plot.key == "palette"
    assert plot.svg.count('class="line') == 1
    (path,) = re.findall(r'd="M([^"Z]*)" class="line', plot.svg)
    heights = [float(pair.split(",")[1]) for pair in path.split(" L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert heights[0] - heights[1] > 1
    assert "a: 16 to 18" in plot.svg, "17 over seeds and prompts, rising by 1 each frame"
    (band,) = re.findall(r'd="M([^"]*) Z" class="band', plot.svg)
    assert band.count("L") == 5


def test_floors_that_would_squash_a_drift_are_named_only(tmp_path: Path):
    rising = {("a", 0): [4.0, 4.2, 4.1], ("b", 0): [4.4, 4.3, 4.2]}
    study = read_study([write_sweep(tmp_path, rising, samples=False, frames=9)])
    (plot,) = drift_plots(make_table(study), {"g0": 0, "g1": 1})
    assert 'class="floor floor-truth"' in plot.svg
    assert "Outside the frame: a, shuffled image 24.10; a, no image 34.10." in plot.note
    assert levels(plot.svg) == ["ground truth"]


def test_frames_without_a_value_are_left_out(tmp_path: Path):
    folder = write_sweep(tmp_path, {("a", 0): [1.0, 2.0]}, samples=False, primary=None)
    values = [[None, 3.0, 5.0, None], [None, 5.0]]
    lines = [{"metric": "speed", "prompt": f"toy/{i}", "value": v} for i, v in enumerate(values)]
    write_lines(folder / "points/p0s0/samples/scores.jsonl", lines)
    (point,) = read_study([folder]).points
    frames = frames_of([point], "speed")
    assert np.array_equal(frames, [[np.nan, 3, 5, np.nan], [np.nan, 5, np.nan, np.nan]], equal_nan=True)
    assert values_of([point], "speed") == {0: {"toy/0": 4.0, "toy/1": 5.0}}
    (plot,) = drift_plots(make_table(read_study([folder])), {"g0": 0})
    assert "nan" not in plot.svg
    assert "a: 4 to 5" in plot.svg


def test_prompts_of_both_variants_are_compared(tmp_path: Path):
    both = {
        ("a", 0): [10.0, 20.0, 30.0],
        ("a", 1): [12.0, 22.0, 32.0],
        ("b", 0): [9.0, 21.0],
        ("b", 2): [0.0],
    }
    study = read_study([write_sweep(tmp_path, both, samples=False)])
    (plot,) = scatter_plots(study, make_table(study))
    assert plot.key == "b \N{MINUS SIGN} a"
    assert re.findall(r'data-tip="([^"]*)"', plot.svg) == ["toy/0: 10.00 → 9.00", "toy/1: 20.00 → 21.00"]
    assert plot.note == "1 of 2 prompts lie below the diagonal, 1 above (worse)."
    marks = re.findall(r'cx="([^"]*)" cy="([^"]*)" r="4.0"', plot.svg)
    (diagonal,) = re.findall(r'x1="([^"]*)" y1="([^"]*)" x2="([^"]*)" y2="([^"]*)" class="truth"', plot.svg)
    x1, y1, x2, y2 = map(float, diagonal)
    sides = [(float(y) - y1) * (x2 - x1) - (float(x) - x1) * (y2 - y1) for x, y in marks]
    assert sides[0] > 0 > sides[1], "pixels grow downwards"


def test_losses_that_are_not_numbers_are_left_out(tmp_path: Path):
    folder = write_sweep(tmp_path, samples=False)
    file = folder / "stages/coarse-c0/metrics.jsonl"
    file.write_text(file.read_text().replace('"loss": 1.0,', '"loss": NaN,'))
    study = read_study([folder])
    coarse, fine = loss_plots(study, {"g0": 0, "g1": 1})
    assert "nan" not in coarse.svg and "nan" not in fine.svg
    assert "Line: mean over seeds; band: their range." in fine.note
    for seed in (0, 1):
        file = folder / f"stages/coarse-c{seed}/metrics.jsonl"
        file.write_text(re.sub(r'"loss": [^,]*', '"loss": NaN', file.read_text()))
    coarse, _ = loss_plots(study, {"g0": 0, "g1": 1})
    assert coarse.note == "coarse: every loss is NaN or infinite."
    assert coarse.svg == ""
