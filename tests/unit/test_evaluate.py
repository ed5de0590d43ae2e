"""`dit-booth evaluate`: scores, a table and a page of any folder of videos."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_booth.commands.evaluate import EvaluateArguments, evaluate, main
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.folder import write_videos
from dit_booth.evaluation.scores import Score, read_scores
from dit_booth.report.read import read_study
from dit_booth.report.table import make_table

torch.set_num_threads(1)

PIXELS = ("oracle", "palette", "psnr", "flicker")


@pytest.fixture
def toyworld(tmp_path: Path) -> Path:
    """Two prompts: the real video of another example, and its own slightly changed; and a floor of the first."""
    world, cases = Toyworld(ToyworldConfig(size=32, frames=3, split="test")), {}
    examples = [world[i] for i in range(2)]
    for i, e in enumerate(examples):
        own = Case(
            video=e.video if i else examples[1].video, image=e.image, caption=e.caption, subject=e.subject,
            prompt=e.key, truth=e.video, identity=e.identity,
        )  # fmt: skip
        cases[f"{i}.mp4"] = own
        cases[f"{i}-none.mp4"] = replace(own, video=torch.zeros_like(e.video), control="none")
    for name, case in cases.items():
        write_video(tmp_path / name, case.video, fps=8)
    write_videos(tmp_path, cases, fps=8)
    return tmp_path


def scored(folder: Path) -> dict[tuple[str, str, str], Score]:
    return {(s.metric, s.prompt, s.control): s for s in read_scores(folder / "scores.jsonl")}


def test_every_video_its_floors_and_the_ground_truth_are_scored_alike(toyworld: Path):
    lines = list(evaluate(EvaluateArguments(videos=str(toyworld), metrics=PIXELS, page=False)))
    scores = scored(toyworld)
    prompts = [f"toyworld/0/test/{i}" for i in range(2)]
    assert {control for _, _, control in scores} == {"", "none", "truth"}
    for metric in ("appearance", "right_shape", "palette", "speed"):
        assert all(len(scores[metric, p, c].value) == 3 for p in prompts for c in ("", "none", "truth"))
    wrong, right = (scores["appearance", p, ""].mean for p in prompts)
    assert right < 10 < wrong
    assert scores["subject_found", prompts[0], "none"].mean == 0
    assert ("psnr", prompts[0], "truth") not in scores  # of the real video to itself
    assert "truth" in lines[0] and "none" in lines[0]
    assert any(line.startswith("Appearance ΔE") for line in lines)


def test_more_metrics_are_added_to_those_that_are_there(toyworld: Path):
    list(evaluate(EvaluateArguments(videos=str(toyworld), metrics=("palette",), page=False)))
    before = scored(toyworld)
    list(evaluate(EvaluateArguments(videos=str(toyworld / "videos.csv"), metrics=("psnr",), page=False)))
    after = scored(toyworld)
    assert {metric for metric, _, _ in after} == {"palette", "subject_found", "psnr"}
    assert all(after[key] == score for key, score in before.items())


def test_videos_that_cannot_be_read_are_counted(toyworld: Path, capsys: pytest.CaptureFixture[str]):
    (toyworld / "1.mp4").write_bytes(b"no video")
    write_video(toyworld / "1-none.mp4", torch.zeros(2, 3, 32, 32), fps=8)  # of another length
    assert main([str(toyworld), "--metrics", "palette", "--no-page"]) == 0
    left_out = json.loads((toyworld / "left_out.json").read_text())
    assert left_out.keys() == {"1.mp4", "1-none.mp4"} and "same frames and size" in left_out["1-none.mp4"]
    assert {prompt for _, prompt, _ in scored(toyworld)} == {"toyworld/0/test/0"}
    assert capsys.readouterr().out.count("left out: ") == 2
    for name in ("0.mp4", "0-none.mp4"):
        (toyworld / name).unlink()
    assert main([str(toyworld), "--metrics", "palette"]) == 1
    assert "none of 4 videos can be read; the first: 0.mp4" in capsys.readouterr().err


def test_a_family_that_fails_is_named_and_the_others_count(toyworld: Path):
    write_video(toyworld / "0.mp4", torch.zeros(3, 3, 32, 40), fps=8)
    text = (toyworld / "videos.csv").read_text().replace("truth/000.mp4", "")
    (toyworld / "videos.csv").write_text(text)
    lines = list(evaluate(EvaluateArguments(videos=str(toyworld), metrics=PIXELS, page=False)))
    assert any("oracle: 0.mp4: " in line and "square" in line for line in lines)
    assert ("palette", "toyworld/0/test/0", "") in scored(toyworld)


def test_videos_of_another_tool_need_no_identity(toyworld: Path):
    rows = [
        "video,image,caption,subject",
        '0.mp4,image/000.png,"a star, moving",star',
        "1.mp4,image/001.png,x,",
    ]
    (toyworld / "mine.csv").write_text("\n".join(rows) + "\n")
    lines = list(evaluate(EvaluateArguments(videos=str(toyworld / "mine.csv"), page=False)))
    metrics = {metric for metric, _, _ in scored(toyworld)}
    assert {"speed", "growth", "flicker"} <= metrics and not metrics & {"appearance", "judge_i", "psnr"}
    assert any("without their weights or package" in line and "clip, dino" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is no CSV file and has no videos.csv"),
        (["--metrics", "orcale"], "--metrics names 'orcale'; nearest: oracle"),
        (["--metrics", "dino"], "dino needs weights.*--weights dino=FILE"),
        (["--metrics", "dino", "--weights", "dino=/none.pth"], "weights dino = '/none.pth': no such file"),
        (["--weights", "dino"], "--weights has 'dino'; write NETWORK=FILE"),
        (["--weights", "dyno=a.pth"], "--weights names 'dyno'; nearest: dino"),
    ],
)
def test_a_wrong_argument_is_one_error(
    toyworld: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    import re

    first = [] if arguments[0] == "nowhere" else [str(toyworld)]
    assert main([*first, *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(message, error) and "Traceback" not in error
    assert not (toyworld / "scores.jsonl").exists()


def test_the_page_compares_folders_of_any_tool(toyworld: Path, tmp_path_factory: pytest.TempPathFactory):
    (toyworld / "1-none.mp4").write_bytes(b"no video")
    assert main([str(toyworld), "--metrics", "oracle", "palette"]) == 0
    page = (toyworld / "report.html").read_text()
    assert "lacks 1 video, which could not be scored; the first: 1-none.mp4" in page
    for text in ("Appearance", "ground truth", "no image", "data:video/mp4"):
        assert text in page
    assert "appearance" in (toyworld / "report.csv").read_text()
    other = tmp_path_factory.mktemp("other") / "mine"
    shutil.copytree(toyworld, other)
    table = make_table(read_study([toyworld, other]))
    assert [row.label for row in table.rows] == [toyworld.name, "mine"]
    assert table.others[0].differences["appearance"].mean == 0
