"""The report: from a sweep's folder to a page that stands alone, and to its table as CSV and LaTeX."""

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from sweep_folder import CAPTIONS, COMMAND, TWO, fail, read_rows, write_lines, write_rows, write_sweep

from dit_booth.commands.report import main
from dit_booth.evaluation.scores import read_scores
from dit_booth.report.export import tex
from dit_booth.study.statistics import holm, paired_difference, t_quantile

torch.set_num_threads(1)
FIVE = {("kept", seed): [10.0 + seed + 5 * p for p in range(6)] for seed in range(5)} | {
    ("trained", seed): [7.0 + seed + 5 * p + 0.1 * ((seed + p) % 3) for p in range(6)] for seed in range(5)
}
"""Five seeds of six prompts: `trained` is lower by 3, but for a small interaction."""
LABELS = ("trained", "kept")
HOSTILE = """</script><script>alert("1")</script><img src=x onerror=alert(1)> & 50% of a_b {x} \\end"""


class Tables(HTMLParser):
    """The texts of a page's tables: class -> rows -> cells. A cell's small print is left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.current: list[list[str]] = []
        self.cell, self.small = False, 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.current = self.tables.setdefault(dict(attrs).get("class", "").split()[-1], [])
        elif tag == "tr":
            self.current.append([])
        elif tag in ("td", "th"):
            self.current[-1].append("")
            self.cell = True
        elif tag in ("small", "em"):
            self.small += 1

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False
        elif tag in ("small", "em"):
            self.small -= 1

    def handle_data(self, data):
        if self.cell and not self.small:
            self.current[-1][-1] += data.strip()


def report(folder: Path, *arguments: str) -> str:
    """The page of a sweep, with both files beside it."""
    assert main([str(folder), "--csv", "--latex", *arguments]) == 0
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two variants with two seeds, and its report."""
    folder = write_sweep(tmp_path_factory.mktemp("report") / "sweep")
    report(folder)
    return folder


@pytest.fixture
def copy(sweep: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sweep, tmp_path / "sweep")


def errors(folder: Path, caplog: pytest.LogCaptureFixture, *arguments: str) -> str:
    """The only line that a failing report says."""
    caplog.clear()
    assert main([str(folder), *arguments]) == 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "\n" not in said[0]
    assert said[0].startswith("error: ")
    return said[0]


# ---- the page ----------------------------------------------------------------------------------------------


def test_the_page_says_what_was_swept_and_how_to_repeat_it(sweep: Path):
    page = (sweep / "report.html").read_text()
    assert "<title>query_projection</title>" in page
    assert "How the query is made." in page
    for fact in ("2</b> variants", "2</b> training seeds", "2</b> prompts", "4 of 4</b> points finished"):
        assert fact in page
    assert f"<pre>{COMMAND}\n" in page
    assert f"dit-booth report {sweep} --csv --latex" in page
    assert f"dit-booth run --config {sweep}/points/p0s0/run.yaml" in page
    assert "<code>kv_concat.query</code></dt><dd>kept · trained</dd>" in page


def test_nothing_is_loaded_from_anywhere(sweep: Path):
    page = (sweep / "report.html").read_text()
    assert not re.search(r"https?:|[\"'(]//|@import|url\(|<link|<iframe|<object", page)
    sources = re.findall(r"(?:src|href|poster|data|action)=\"([^\"]*)\"", page)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in page  # the browser would refuse it too


def test_the_table_of_the_page_is_that_of_the_files(sweep: Path):
    page = Tables((sweep / "report.html").read_text()).tables["results"]
    lines = list(csv.DictReader((sweep / "report.csv").open()))
    latex = (sweep / "report.tex").read_text().split("\\midrule")[1].split("\\bottomrule")[0]
    assert [row[0] for row in page if row[0] in ("kept", "trained")] == ["kept", "trained"]
    digits = {"palette": (2, 1), "clip_i": (3, 1), "trained_parameters": (2, 1e6), "flops_per_step": (2, 1e9)}
    digits |= {
        "step_seconds": (2, 1),
        "peak_memory_mib": (0, 1),
        "train_flops": (2, 1e12),
        "train_seconds": (2, 60),
    }
    for line, shown, tex_line in zip(lines[:2], page[2:4], latex.strip().splitlines(), strict=True):
        wanted = [f"{float(line[name]) / scale:.{n}f}" for name, (n, scale) in digits.items()]
        assert shown[2:] == wanted
        cells = [
            re.sub(r"\\textbf\{(.*?)\}|\{\\scriptsize.*?\}| ", r"\1", cell) for cell in tex_line.split("&")
        ]
        assert [cell.rstrip("\\") for cell in cells] == [line["variant"], *wanted]
    assert float(lines[0]["palette"]) == 16.5  # of 15 and 18
    stderr = (
        1.5**2 + 5.5**2 - 0.5**2
    ) ** 0.5  # seed means 15 and 18, prompt means 11 and 22, residuals +-0.5
    assert float(lines[0]["palette_df"]) == pytest.approx(stderr**4 / (1.5**4 + 5.5**4 + 0.5**4))
    assert float(lines[0]["palette_high"]) - 16.5 == pytest.approx(
        t_quantile(float(lines[0]["palette_df"])) * stderr
    )
    assert [line["prompts"] for line in lines] == ["2"] * 5
    assert [line["wall_seconds"] for line in lines[:2]] == ["130.0", "130.0"], "in the file alone"


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


def test_the_best_is_marked_where_better_is(sweep: Path):
    rows = (sweep / "report.html").read_text().split("<tbody>")[1].split("</tbody>")[0].split("</tr>")
    best = [re.findall(r'best" data-v="([^"]*)"', row) for row in rows[:2]]
    assert best[0] == []
    assert [float(value) for value in best[1]] == pytest.approx([13.0, 0.77])  # lower palette, higher CLIP-I


def test_videos_and_prompts_are_inside(sweep: Path):
    page = (sweep / "report.html").read_text()
    videos = re.findall(r'<video src="data:video/mp4;base64,([^"]*)" class="tiny"', page)
    assert (
        len(videos) == 2 * 3 + 4 * 2
    )  # for each prompt the ground truth and both variants; two of each point
    assert base64.b64decode(videos[1]) == (sweep / "points/p0s0/samples/000-seed0.mp4").read_bytes()
    assert base64.b64decode(videos[0]) == (sweep / "points/p0s0/samples/truth/000.mp4").read_bytes()
    picture = re.findall(r'<img src="data:image/png;base64,([^"]*)"', page)[1]
    assert base64.b64decode(picture) == (sweep / "points/p0s0/samples/image/001.png").read_bytes()
    assert "first 2 prompts, all of training seed 0" in page


def test_rows_of_samples_go_until_the_page_fits(copy: Path, caplog: pytest.LogCaptureFixture):
    whole = len(report(copy).encode())
    page = report(copy, "--max-mb", str((whole - 100) / 1e6))
    assert len(page.encode()) < whole - 100
    assert page.count("<video") == 6 + 3 * 2, "the ends of a point go first"
    assert "1 more point did not fit" in page
    assert "the ends of 1 points did not fit" in caplog.text
    bare = len(re.sub('base64,[^"]*', "", page).encode())
    page = report(copy, "--max-mb", str((bare + 5500) / 1e6))
    assert page.count("<video") == 3
    assert "1 more row did not fit" in page
    assert "1 sample rows did not fit" in caplog.text
    page = report(copy, "--max-mb", "0.000001")
    assert "<video" not in page
    assert "2 more rows did not fit" in page
    assert "larger than --max-mb 1e-06 even without videos" in caplog.text


def test_settings_that_differ_and_that_do_not(sweep: Path):
    page = (sweep / "report.html").read_text()
    assert ["kv_concat.query", "kept", "trained"] in Tables(page).tables["settings"]
    assert "<code>train.seed</code> 0, 1" in page
    assert "<code>train.lr</code></dt><dd>0.001</dd>" in page
    assert "<code>out</code>" not in page


def test_a_shared_stage_is_drawn_once(sweep: Path, copy: Path):
    drawn = (sweep / "report.html").read_text().split("loss of stage ")
    coarse, fine = drawn[1], drawn[2].split("</svg>")[0]
    assert coarse.split("</svg>")[0].count('class="line shared"') == 1
    assert "shared by all variants" in coarse
    assert fine.count('class="line c') == 2
    shutil.rmtree(copy / "stages")  # then they are in the points' own logs
    rows = read_rows(copy)
    for row in rows:
        file = copy / row["run"] / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        write_lines(file, [*[line | {"stage": "coarse"} for line in lines if "step" in line], *lines])
    assert report(copy).count('class="line shared"') == 1


# ---- what a reader must know -------------------------------------------------------------------------------


def test_caveats_come_from_the_data(sweep: Path, tmp_path: Path):
    page = (sweep / "report.html").read_text()
    assert "Exploratory: 2 training seeds per variant; no difference is marked below 5." in page
    assert "With 2 seeds a 95 % interval may reach 12.7 standard errors" in page
    assert "Few prompts: 2 per point" in page
    assert "All data are the toy world&#39;s (drawn shapes, 12 pixels, 3 frames)" in page
    assert "Declared, but not tested with so few training seeds: 1 contrast of Palette." in page
    one = report(write_sweep(tmp_path / "one", {k: v for k, v in TWO.items() if k[1] == 0}))
    assert (
        "Exploratory: 1 training seed per variant; no difference is marked below 5. Intervals are over prompts"
        in one
    )
    assert Tables(one).tables["differences"][1][1] == "\N{MINUS SIGN}3.50"  # -3 and -4: far too few prompts
    many = {("kept", s): [10.0 + s + i for i in range(40)] for s in range(5)}
    page = report(write_sweep(tmp_path / "many", many, samples=False))
    assert "Few " not in page
    assert "No variant is the baseline" not in page  # a single one needs none


def test_failed_points_are_listed_and_the_rest_is_shown(copy: Path):
    fail(copy, "p1s1", "Traceback ...", f"RuntimeError: {HOSTILE}")
    fail(copy, "p0s1")
    page = report(copy)
    assert "2 of 4 points are in the table: 1 failed and 1 are not finished." in page
    assert "RuntimeError: &lt;/script&gt;" in page
    assert "of 2 seeds" in page
    assert [row[1] for row in Tables(page).tables["results"][2:4]] == ["1 × 2", "1 × 2"]  # noqa: RUF001
    assert page.count("<video") == 6 + 2 * 2  # the grid, and the ends of both points


def test_a_variant_without_a_finished_point_is_listed_with_what_became_of_it(copy: Path):
    fail(copy, "p1s0", "out of memory")
    fail(copy, "p1s1")
    table = Tables(report(copy)).tables["results"]
    kept, trained = table[2:4]
    assert trained == ["trained", "1 failed, 1 waiting", *["–"] * (len(kept) - 2)]  # noqa: RUF001
    line = list(csv.DictReader((copy / "report.csv").open()))[1]
    told = {name: value for name, value in line.items() if value not in ("", "0")}
    assert told == {"variant": "trained", "status": "1 failed, 1 waiting"}
    dashes = " & ".join(["--"] * (len(kept) - 2))
    assert rf"trained (1 failed, 1 waiting) & {dashes} \\" in (copy / "report.tex").read_text()


def test_rows_without_training_costs_have_them_from_their_points(copy: Path):
    rows = read_rows(copy)
    for row in rows:
        del row["train_seconds"], row["train_flops"]
        stages = [{"name": "fine", "seconds": 5.0, "steps": 10, "flops_per_step": 2e9}]
        (copy / row["run"] / "cost.json").write_text(json.dumps({"stages": [*stages, *stages]}))
    write_rows(copy, rows)
    line = next(csv.DictReader((report(copy), (copy / "report.csv").open())[1]))
    assert (line["train_seconds"], line["train_flops"]) == ("10.0", "40000000000.0")


def test_a_sweep_with_no_finished_point_has_a_page_that_says_so(copy: Path):
    for row in read_rows(copy):
        fail(copy, row["point"], "out of memory")
    page = report(copy)
    assert "No point has finished (4 planned)" in page
    assert "results" not in Tables(page).tables
    assert page.count("out of memory") == 4
    lines = ["variant,status,baseline,seeds,prompts", "kept,failed,0,0,0", "trained,failed,0,0,0"]
    assert (copy / "report.csv").read_text().splitlines() == lines
    assert "tabular" not in (copy / "report.tex").read_text()


def test_hostile_words_stay_words(copy: Path):
    rows = read_rows(copy)
    write_rows(copy, [row | {"label": HOSTILE, "options": {HOSTILE: HOSTILE}} for row in rows])
    (copy / "sweep.yaml").write_text(json.dumps({"name": HOSTILE, "about": HOSTILE}))
    page = report(copy)
    assert page.count("<script") == 1
    assert "<img src=x" not in page
    assert "<b>circle</b>" not in page
    assert Tables(page).tables["results"][2][0].startswith(HOSTILE)
    latex = (copy / "report.tex").read_text()
    assert tex(HOSTILE) in latex
    assert r"50\% of a\_b \{x\} \textbackslash{}end" in latex


def test_numbers_that_are_none(copy: Path):
    """A PSNR may be infinite, a metric may lack in one variant, and a cost may be unknown."""
    rows = read_rows(copy)
    for row in rows:
        row["step_seconds"] = None
        file = copy / row["run"] / "samples/scores.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [line for line in lines if line["metric"] != "clip_i" or row["group"] == "g0"]
        psnr = [{"metric": "psnr", "prompt": f"toy/{i}", "value": float("inf")} for i in range(2)]
        write_lines(file, [*kept, *psnr])
    write_rows(copy, rows)
    table = Tables(report(copy)).tables["results"]
    assert table[2][2:5] == ["16.50", "0.735", "∞"]
    assert table[3][2:5] == ["13.00", "–", "∞"]  # noqa: RUF001
    assert "Step time" not in str(table[1])


def test_another_baseline(copy: Path, caplog: pytest.LogCaptureFixture):
    page = report(copy, "--baseline", "trained")
    assert Tables(page).tables["differences"][1][:2] == ["kept", "+3.50"]
    assert "must be one of: kept, trained" in errors(copy, caplog, "--baseline", "nobody")
    rows = read_rows(copy)
    write_rows(copy, [row | {"baseline": False} for row in rows])
    page = report(copy)
    assert "differences" not in Tables(page).tables
    assert "--baseline LABEL names one" in page


# ---- runs, and files that are not as they should be --------------------------------------------------------


def test_runs_are_compared_too(sweep: Path, tmp_path: Path):
    runs = [str(sweep / "points" / name) for name in ("p0s0", "p1s0")]
    out = tmp_path / "deep" / "runs.html"
    assert main([*runs, "--out", str(out), "--csv"]) == 0
    tables = Tables(out.read_text()).tables
    assert [row[0] for row in tables["results"][2:4]] == ["p0s0", "p1s0"]
    assert tables["differences"][1][:2] == ["p1s0", "\N{MINUS SIGN}3.50"]
    assert ["kv_concat.query", "kept", "trained"] in tables["settings"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["runs.csv", "runs.html"]


def test_scored_videos_of_another_tool_are_compared_with_a_run(sweep: Path, tmp_path: Path):
    mine = shutil.copytree(sweep / "points/p1s0/samples", tmp_path / "mine")
    (mine / "left_out.json").write_text(json.dumps({"009.mp4": "<b>broken</b>"}))
    out = tmp_path / "page.html"
    assert main([str(sweep / "points/p0s0"), str(mine), "--out", str(out)]) == 0
    tables = Tables(out.read_text()).tables
    assert [(row[0], row[2]) for row in tables["results"][2:4]] == [("p0s0", "15.00"), ("mine", "11.50")]
    assert f"dit-booth evaluate {mine}" in out.read_text()
    assert "1 video could not be scored: see the list below the samples." in out.read_text()
    assert tables["left-out"][1:] == [["mine", "009.mp4", "<b>broken</b>"]]
    assert main([str(sweep / "points/p0s0/samples"), "--out", str(out)]) == 0, (
        "as `dit-booth evaluate RUN` calls it"
    )
    assert Tables(out.read_text()).tables["results"][2][0] == "p0s0"


def test_image_prompts_of_any_format_are_shown(copy: Path):
    file = copy / "points/p0s0/samples/image/000.png"
    with Image.open(file) as picture:
        picture.resize((1000, 500)).save(file, format="JPEG")
    page = report(copy)
    shown = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]*)"', page)]
    with Image.open(io.BytesIO(shown[0])) as picture:
        assert (picture.format, picture.size) == ("PNG", (512, 256))
    file.write_text("no picture")
    assert "unreadable</div>" in report(copy)


def test_a_page_has_no_copy_of_a_file_outside_the_folder(copy: Path, caplog: pytest.LogCaptureFixture):
    file = copy / "points/p0s0/samples/videos.csv"
    file.write_text(file.read_text().replace("image/000.png", "../../p1s0/samples/image/000.png"))
    assert "leads out of" in errors(copy, caplog)


def test_a_run_that_is_not_finished_has_no_row(sweep: Path, tmp_path: Path):
    run = shutil.copytree(sweep / "points" / "p0s0", tmp_path / "run")
    (run / "finished").unlink()
    (run / "metrics.jsonl").unlink()
    assert main([str(run), "--out", str(tmp_path / "a.html")]) == 0
    assert "No point has finished (1 planned)" in (tmp_path / "a.html").read_text()


def test_a_line_being_written_is_left_out(copy: Path):
    with (copy / "points/p0s0/metrics.jsonl").open("a") as out:
        out.write('{"stage": "fine", "st')
    report(copy)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("sweep.jsonl", "", "is empty; run the sweep"),
        ("sweep.jsonl", "{nonsense}\n", "sweep.jsonl:1: not JSON"),
        ("sweep.jsonl", "[1]\n", "sweep.jsonl:1: holds a list"),
        ("sweep.jsonl", '{"point": "a"}\n', "sweep.jsonl:1: group is None"),
        ("sweep.yaml", "a: b: c", "sweep.yaml: not YAML"),
        ("sweep.yaml", "[1]", "sweep.yaml: holds a list"),
        ("points/p1s0/run.yaml", "- 1", "run.yaml: holds a list"),
        ("points/p1s0/samples/scores.jsonl", '{"value": "far"}\n', "scores.jsonl:1: no score (value 'far'"),
        (
            "points/p1s0/samples/videos.csv",
            "video,noise_seed\na.mp4,0\n",
            "has no column image, caption, subject",
        ),
        (
            "sweep.yaml",
            "primary: {metric: palete}",
            "primary.metric is 'palete', which is no metric; nearest: palette",
        ),
        ("stages/coarse-c0/metrics.jsonl", "x\ny\n", "coarse-c0/metrics.jsonl:1: not JSON"),
    ],
)
def test_a_malformed_file_is_one_line(copy: Path, caplog: pytest.LogCaptureFixture, file, content, message):
    (copy / file).write_text(content)
    assert message in errors(copy, caplog)


def test_what_is_missing_is_one_line(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert "is not a folder" in errors(tmp_path / "nowhere", caplog)
    assert "no sweep.jsonl, no run.yaml and no scores.jsonl" in errors(tmp_path, caplog)
    assert "suffix .html" in errors(copy, caplog, "--out", "x.pdf")
    assert "give it alone" in errors(copy, caplog, str(copy / "points" / "p0s0"))
    assert "max_mb is 0" in errors(copy, caplog, "--max-mb", "0")
    shutil.rmtree(copy / "points" / "p1s0")
    assert "p1s0 is missing, but the point is finished" in errors(copy, caplog)


def test_a_broken_video_costs_its_place_only(copy: Path):
    video = copy / "points/p1s0/samples/001-seed0.mp4"
    video.write_bytes(video.read_bytes()[:300])
    (copy / "points/p0s0/samples/000-seed0.mp4").unlink()
    page = report(copy)
    grid, ends = page.split('class="given samples"')[1].split("Worst and best videos")
    assert grid.count("<video") == 4
    assert [part.count("unreadable</div>") for part in (grid, ends)] == [1, 1]
    assert [part.count("not saved</div>") for part in (grid, ends)] == [1, 1]
    assert str(video) in page


def test_points_without_scores_are_counted(copy: Path):
    (copy / "points/p1s0/samples/scores.jsonl").unlink()
    assert "1 of 4 finished points have no scores (samples/scores.jsonl)." in report(copy)
    for row in read_rows(copy):
        (copy / row["run"] / "samples/scores.jsonl").unlink(missing_ok=True)
    page = report(copy)
    assert "No video was scored: no point has a file samples/scores.jsonl." in page
    assert Tables(page).tables["results"][2][2:4] == ["1.20", "41.20"]  # costs alone
