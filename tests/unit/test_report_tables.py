"""What a report's tables say: floors and ceilings, primary contrasts, drift, prompts, the ends of each point."""

import base64
import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from report_page import Tables, report
from sweep_folder import CAPTIONS, fail, read_rows, write_lines, write_sweep

from dit_booth.commands.report import main
from dit_booth.evaluation.scores import read_scores
from dit_booth.study.statistics import holm, paired_difference

torch.set_num_threads(1)
FIVE = {("kept", seed): [10.0 + seed + 5 * p for p in range(6)] for seed in range(5)} | {
    ("trained", seed): [7.0 + seed + 5 * p + 0.1 * ((seed + p) % 3) for p in range(6)] for seed in range(5)
}
"""Five seeds of six prompts: `trained` is lower by 3, but for a small interaction."""
LABELS = ("trained", "kept")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants with two seeds, and its report."""
    folder = write_sweep(tmp_path_factory.mktemp("report") / "sweep")
    report(folder)
    return folder


@pytest.fixture
def copy(sweep: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sweep, tmp_path / "sweep")


# ---- floors and contrasts --------------------------------------------------------------------------------------


def test_floors_and_the_ground_truth_are_rows_like_any_other(sweep: Path):
    page = Tables((sweep / "report.html").read_text()).tables
    minus = "\N{MINUS SIGN}"
    assert [row[:4] for row in page["results"][-3:]] == [
        ["ground truth", "2 × 2", "1.50", "0.885"],  # noqa: RUF001
        ["kept, shuffled image", "2 × 2", "36.50", "0.535"],  # noqa: RUF001
        ["kept, no image", "2 × 2", "46.50", "0.435"],  # noqa: RUF001
    ]
    assert [row[:2] for row in page["differences"][-3:]] == [
        ["ground truth", f"{minus}15.00"],
        ["kept, shuffled image", "+20.00"],
        ["kept, no image", "+30.00"],
    ]
    lines = list(csv.DictReader((sweep / "report.csv").open()))[2:]
    assert [(line["variant"], line["status"], float(line["palette"])) for line in lines] == [
        ("ground truth", "control", 1.5),
        ("kept, shuffled image", "control", 36.5),
        ("kept, no image", "control", 46.5),
    ]
    latex = (sweep / "report.tex").read_text().split("\\midrule")[2]
    assert latex.strip().startswith("ground truth & 1.50")


def test_a_primary_contrast_is_tested_and_marked(tmp_path: Path):
    sweep = write_sweep(tmp_path / "five", FIVE, samples=False)
    page = report(sweep)
    tables = Tables(page).tables
    found = paired_difference(
        *({s: dict(zip("abcdef", FIVE[n, s], strict=True)) for s in range(5)} for n in LABELS)
    )
    assert found
    change = f"\N{MINUS SIGN}{-found.mean:.2f}*"
    assert tables["contrasts"][1] == ["trainedminuskept", "5 × 6", change, "<0.001", "better"]  # noqa: RUF001
    assert tables["differences"][1][:2] == ["trained", change]
    assert "better" in page.split('class="sortable differences"')[1].split("</tr>")[1]
    assert "xploratory" not in page.split("Primary contrasts")[1].split("<p")[0]
    assert "Exploratory" not in page
    assert "Declared and tested together (Holm): 1 contrast of Palette. All other differences" in page
    line = list(csv.DictReader((sweep / "report.csv").open()))[1]
    assert float(line["palette_difference"]) == pytest.approx(found.mean)
    assert float(line["palette_difference_high"]) == pytest.approx(found.main.high)
    (line,) = csv.DictReader((sweep / "report.contrasts.csv").open())
    assert (line["variant"], line["minus"], line["verdict"]) == ("trained", "kept", "better")
    assert float(line["p_holm"]) == pytest.approx(found.main.p) == pytest.approx(float(line["p"]))
    latex = (sweep / "report.tex").read_text()
    assert latex.count("$^*$") == 2
    assert r"& \textless{}0.001 & better \\" in latex


def test_below_five_training_seeds_nothing_is_marked(tmp_path: Path):
    four = {key: values for key, values in FIVE.items() if key[1] < 4}
    sweep = write_sweep(tmp_path / "four", four, samples=False)
    page = report(sweep)
    contrast = Tables(page).tables["contrasts"][1]
    assert contrast[3:] == ["–", "exploratory: 4 training seeds of the 5 that a test needs"]  # noqa: RUF001
    assert "Exploratory: 4 training seeds per variant; no difference is marked below 5." in page
    cells = [cell for rows in Tables(page).tables.values() for row in rows for cell in row]
    assert not any("*" in cell for cell in cells)
    assert "$^*$" not in (sweep / "report.tex").read_text()
    assert "diff better" not in page and "diff worse" not in page


def test_holm_is_over_all_declared_contrasts_and_other_differences_have_no_mark(tmp_path: Path):
    third = {("third", s): [v + 0.05 * (s - 2) + 0.6 for v in FIVE["kept", s]] for s in range(5)}
    pairs = {"metric": "palette", "contrasts": [["trained", "third"], ["third", "kept"]]}
    page = report(write_sweep(tmp_path / "three", FIVE | third, samples=False, primary=pairs))
    tables = Tables(page).tables
    assert [row[0] for row in tables["contrasts"][1:]] == ["trainedminusthird", "thirdminuskept"]
    marked = {row[0]: "*" in row[1] for row in tables["differences"][1:3]}
    assert marked == {"trained": False, "third": True}, "trained against kept was not declared"
    lines = list(csv.DictReader((tmp_path / "three/report.contrasts.csv").open()))
    ps = [float(line["p"]) for line in lines]
    assert [float(line["p_holm"]) for line in lines] == pytest.approx(holm(ps))
    assert ps != holm(ps)


def test_a_margin_is_tested_where_it_was_declared(tmp_path: Path):
    near = {
        ("near", s): [v + 0.02 * ((s + i) % 3 - 1) for i, v in enumerate(FIVE["kept", s])] for s in range(5)
    }
    primary = {"metric": "palette", "contrasts": "baseline", "margin": 0.5}
    page = report(write_sweep(tmp_path / "near", FIVE | near, samples=False, primary=primary))
    verdicts = {row[0]: row[4] for row in Tables(page).tables["contrasts"][1:]}
    assert verdicts == {
        "nearminuskept": "no difference shown; equivalent within ±0.5 ΔE",
        "trainedminuskept": "better; non-inferior (margin 0.5 ΔE)",
    }
    assert "declared margin of 0.5 ΔE" in page


def test_without_a_declared_question_nothing_is_tested(tmp_path: Path):
    page = report(write_sweep(tmp_path / "none", FIVE, samples=False, primary=None))
    assert "contrasts" not in Tables(page).tables
    assert "*" not in str(Tables(page).tables["differences"])
    assert "No primary contrast was declared: all 8 differences are descriptive" in page
    assert not (tmp_path / "none/report.contrasts.csv").exists()


def test_a_contrast_of_a_point_that_is_missing_says_so(copy: Path):
    fail(copy, "p1s0")
    fail(copy, "p1s1")
    (row,) = Tables(report(copy)).tables["contrasts"][1:]
    assert row[1:] == ["–", "–", "–", "not measured: no seed and prompt in common"]  # noqa: RUF001
    assert "trained $-$ kept & -- & -- & not measured" in (copy / "report.tex").read_text()


def test_the_diagnostics_stand_beside_the_interval(sweep: Path):
    """-3 and -4 for each prompt, the same for each seed: no spread over seeds, and two prompts."""
    line = list(csv.DictReader((sweep / "report.csv").open()))[1]
    ends = [
        float(line[f"palette_difference_{over}_{end}"])
        for over in ("seeds", "prompts")
        for end in ("low", "high")
    ]
    half = 12.7062 * 0.5
    assert ends == pytest.approx([-3.5, -3.5, -3.5 - half, -3.5 + half], abs=1e-3)
    assert float(line["palette_difference_low"]) == pytest.approx(-3.5 - half, abs=1e-3)


def test_the_scores_of_all_points_are_kept_beside_the_page(sweep: Path, tmp_path: Path):
    assert main([str(sweep), "--out", str(tmp_path / "page.html"), "--scores"]) == 0
    scores = read_scores(tmp_path / "page.scores.jsonl.gz")
    assert {(score.point, score.seed) for score in scores} == {
        ("p0s0", 0),
        ("p0s1", 1),
        ("p1s0", 0),
        ("p1s1", 1),
    }
    own = [score for score in scores if (score.point, score.metric, score.control) == ("p1s1", "palette", "")]
    assert [(score.prompt, score.value) for score in own] == [("toy/0", (8, 9, 10)), ("toy/1", (19, 20, 21))]
    assert {score.control for score in scores if score.point == "p0s0"} == {"", "truth", "shuffled", "none"}


def test_noise_seeds_are_averaged_before_anything_else(copy: Path):
    file = copy / "points/p1s0/samples/scores.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    more = [
        line | {"noise_seed": 1, "value": [v + 4 for v in line["value"]]}
        for line in lines
        if line["metric"] == "palette"
    ]
    write_lines(file, [*lines, *more])
    report(copy)
    line = list(csv.DictReader((copy / "report.csv").open()))[1]
    assert (float(line["palette"]), line["prompts"]) == (14.0, "2")  # 13, and one of two seeds is higher by 2


# ---- drift, prompts and ends ---------------------------------------------------------------------------------


def test_drift_is_in_numbers_and_in_a_plot(sweep: Path):
    page = (sweep / "report.html").read_text()
    assert Tables(page).tables["drift"][1:] == [
        ["kept", "+1.000", "+2.000", "2.000"],
        ["trained", "+1.000", "+2.000", "2.000"],
        ["ground truth", "0.000", "0.000", "0.000"],
        ["kept, shuffled image", "+1.000", "+2.000", "2.000"],
        ["kept, no image", "+1.000", "+2.000", "2.000"],
    ]
    drift = page.split('class="quality drifts')[1].split("</figure>")[0]
    assert drift.count("<svg viewBox") - drift.count('class="swatch"') == 1, "CLIP-I has no values per frame"
    assert drift.count('class="line') == 2


def test_a_video_of_one_frame_has_no_drift(tmp_path: Path):
    page = report(write_sweep(tmp_path / "one", samples=False, frames=1))
    assert "drift" not in Tables(page).tables
    assert "drifts" not in page.split("<main>")[1]


def test_each_prompt_of_the_primary_contrast_is_a_dot(sweep: Path):
    page = (sweep / "report.html").read_text()
    scatter = page.split('class="quality scatters')[1].split("</figure>")[0]
    assert scatter.count('class="prompt"') == 2
    assert "2 of 2 prompts lie below the diagonal, 0 above (worse)." in scatter
    assert f'data-tip="{CAPTIONS[0]}: 11.00 → 8.00"' in scatter


def test_the_worst_and_the_best_videos_of_each_point(tmp_path: Path):
    sweep = write_sweep(tmp_path / "five", FIVE, side=8)
    page = report(sweep)
    rows = re.findall(r"<tr><th scope=\"row\">(\d)</th><td>(.*?)</td><td>(.*?)</td></tr>", page, re.DOTALL)
    assert [seed for seed, *_ in rows] == list("0123401234")
    values = [re.findall(r"<small>([^<]*)</small>", part) for part in rows[0][1:]]
    assert values == [["35.00", "30.00", "25.00"], ["20.00", "15.00", "10.00"]]
    worst = re.findall(r"base64,([^\"]*)", rows[0][1])
    assert base64.b64decode(worst[0]) == (sweep / "points/p0s0/samples/005-seed0.mp4").read_bytes()


def test_consistency_stands_beside_motion_and_says_why(copy: Path):
    for row in read_rows(copy):
        file = copy / row["run"] / "samples/scores.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        extra = [
            line | {"metric": name, "value": [None, 0.5, 0.5]}
            for line in lines
            if line["metric"] == "palette"
            for name in ("growth", "speed", "clip_consistency", "lite0_i")
        ]
        write_lines(file, [*lines, *extra])
    page = report(copy)
    heads = Tables(page).tables["results"][1]
    assert heads[2:8] == [
        "Palette↓", "CLIP image↑", "EfficientNet\u2011Lite0 image↑", "CLIP consistency", "Speed", "Growth",
    ]  # fmt: skip
    assert "A still video wins consistency" in page
    assert "A still video wins every consistency: read it beside speed." in page
