"""The report: from a sweep's folder to a page that stands alone, and to its table as CSV and LaTeX."""

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_page import Tables, report
from sweep_folder import COMMAND, TWO, fail, read_rows, write_lines, write_rows, write_sweep

from dit_booth.commands.report import main
from dit_booth.report.export import tex
from dit_booth.study.statistics import t_quantile

torch.set_num_threads(1)
HOSTILE = """</script><script>alert("1")</script><img src=x onerror=alert(1)> & 50% of a_b {x} \\end"""


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
    assert "mine lacks 1 video, which could not be scored; the first: &lt;b&gt;broken" in out.read_text()
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
