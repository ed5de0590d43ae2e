"""The human study without a browser: reading runs, designs, the page's data, answers, exclusions."""

from __future__ import annotations

import base64
import csv
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_booth.commands.study import main
from dit_booth.data.video import write_video
from dit_booth.evaluation.scores import Score, write_scores
from dit_booth.human.answers import read_answers, to_file
from dit_booth.human.design import Cell, draw_cells, draw_lists
from dit_booth.human.exclude import Rules, check_rater
from dit_booth.human.key import Key, read_key
from dit_booth.human.predict import PEOPLE
from dit_booth.human.simulate import Population, simulate_answers
from experiments.bench.human_study import plain_key, write_demo

HTML = 'a "<b>star</b>" </script><img src=x onerror=alert(1)> & co'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, noise in (("sharpest", 0.0), ("grainy", 0.3), ("noisy", 0.8)):
        write_demo(folder, name, noise, prompts=4, size=32, frames=4)
    for file in folder.glob("*/videos.csv"):
        rows = list(csv.DictReader(file.open()))
        rows[0]["caption"] = HTML
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of three systems and four prompts, with two questions."""
    out = tmp_path_factory.mktemp("study")
    names = [str(runs / name) for name in ("sharpest", "grainy", "noisy")]
    words = ["--raters", "6", "--pairs", "8", "--questions", "quality", "motion"]
    assert main(["make", *names, "--out", str(out), *words]) == 0
    return out


def one_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command refuses."""
    assert main(list(arguments)) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- design ---------------------------------------------------------------------------------------------------------


def test_all_pairs_and_the_baseline():
    rng = np.random.default_rng(0)
    assert len(draw_cells("all", 4, 5, block=2, rng=rng)) == 6 * 5
    cells = draw_cells("baseline", 4, 5, block=2, rng=rng)
    assert {(c.first, c.second) for c in cells} == {(0, 1), (0, 2), (0, 3)} and len(cells) == 15


def test_blocks_are_balanced_where_they_can_be():
    """7 systems in 7 blocks of 3: the Fano plane, each pair once. 30 systems: the nearest that is found."""
    found = [draw_cells("blocks", 7, 7, block=3, rng=np.random.default_rng(seed)) for seed in range(20)]
    exact = [Counter((c.first, c.second) for c in cells) for cells in found]
    assert any(set(counts.values()) == {1} and len(counts) == 21 for counts in exact)
    cells = draw_cells("blocks", 5, 20, block=3, rng=np.random.default_rng(1))
    counts = Counter((c.first, c.second) for c in cells)
    assert len(counts) == 10 and max(counts.values()) - min(counts.values()) <= 1
    assert all(sum(c.prompt == p for c in cells) == 3 for p in range(20))
    assert len(draw_cells("blocks", 30, 3, block=4, rng=np.random.default_rng(0))) == 18


def test_lists_are_balanced_and_drawn_by_seed():
    cells = draw_cells("all", 4, 6, block=2, rng=np.random.default_rng(0))
    numbers = {"raters": 12, "pairs": 12, "planted": 3, "repeats": 2}
    lists = draw_lists(cells, rng=np.random.default_rng(3), **numbers)
    assert lists == draw_lists(cells, rng=np.random.default_rng(3), **numbers)
    assert lists != draw_lists(cells, rng=np.random.default_rng(4), **numbers)
    shown = Counter(slot.index for own in lists for slot in own if slot.kind == "pair")
    assert len(shown) == 36 and set(shown.values()) == {4}
    sides = Counter((slot.index, slot.swapped) for own in lists for slot in own if slot.kind == "pair")
    assert set(sides.values()) == {2}  # each pair of videos twice on either side
    for own in lists:
        assert Counter(slot.kind for slot in own) == {"pair": 12, "planted": 3, "repeat": 2}
        prompts = Counter(cells[slot.index].prompt for slot in own if slot.kind == "pair")
        assert set(prompts.values()) == {2}
        assert sorted(slot.index for slot in own if slot.kind == "planted") == [0, 1, 2]
        for place, slot in enumerate(own):
            if slot.kind == "repeat":
                first = next(n for n, s in enumerate(own) if s.kind == "pair" and s.index == slot.index)
                assert place - first > len(own) // 4 and own[first].swapped != slot.swapped


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"pairs": 7}, "pairs is 7; the design has 6 pairs"),
        ({"raters": 0}, "raters is 0"),
        ({"repeats": 9}, "repeats is 9"),
        ({"planted": -1}, "planted is -1"),
    ],
)
def test_impossible_lists_are_refused(changed: dict[str, int], said: str):
    cells = [Cell(p, 0, 1) for p in range(6)]
    numbers = {"raters": 2, "pairs": 6, "planted": 0, "repeats": 0, **changed}
    with pytest.raises(ValueError, match=re.escape(said)):
        draw_lists(cells, rng=np.random.default_rng(0), **numbers)
    with pytest.raises(ValueError, match="block is 9"):
        draw_cells("blocks", 3, 4, block=9, rng=np.random.default_rng(0))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained_and_blinded(made: Path, runs: Path):
    page = (made / "study.html").read_text()
    shown = json.loads(re.search(r'id="study">(.*?)</script>', page, re.S)[1])
    key = read_key(made / "key.json")
    assert shown["prompts"][0]["caption"] == HTML and "<img src=x" not in page and "<b>star" not in page
    for word in ("sharpest", "grainy", "noisy", str(runs), "planted", 'repeat"'):
        assert word not in page.replace("planted: ", "")
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert [[[t.prompt, t.left, t.right] for t in own] for own in key.lists] == shown["lists"]
    order = [clip.system for clip in key.clips if clip.system is not None]
    assert order != sorted(order)  # a clip's number does not follow its system
    # Each clip of the page is the system's own file.
    by_prompt = {prompt.name: number for number, prompt in enumerate(key.prompts)}
    rows = {
        by_prompt[r["prompt"]]: r["video"] for r in csv.DictReader((runs / "grainy" / "videos.csv").open())
    }
    number, clip = next((n, c) for n, c in enumerate(key.clips) if c.system == 1)
    embedded = re.search(rf'id="m{number}">([^<]*)<', page)[1]
    assert base64.b64decode(embedded) == (runs / "grainy" / rows[clip.prompt]).read_bytes()


def test_videos_may_lie_beside_the_page(runs: Path, tmp_path: Path):
    names = [str(runs / "sharpest"), str(runs / "noisy")]
    words = [
        "--pairs",
        "4",
        "--planted",
        "1",
        "--repeats",
        "1",
        "--beside",
        "--post",
        "https://lab.example/in",
    ]
    assert main(["make", *names, "--out", str(tmp_path), *words]) == 0
    page = (tmp_path / "study.html").read_text()
    assert len(list((tmp_path / "media").glob("*.mp4"))) == len(read_key(tmp_path / "key.json").clips) == 12
    assert "base64,AAAA" not in page and "connect-src &#39;self&#39; https://lab.example" in page


def test_runs_that_do_not_fit_are_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sharpest, out = str(runs / "sharpest"), ["--out", str(tmp_path / "out")]
    small = ["--pairs", "2", "--planted", "1", "--repeats", "0"]
    assert "at least 2" in one_error(capsys, "make", sharpest, *out)
    assert "two runs are called 'sharpest'" in one_error(capsys, "make", sharpest, sharpest, *out)
    assert "has no videos.csv" in one_error(capsys, "make", sharpest, str(tmp_path), *out)
    other = write_demo(tmp_path, "fewer", 0.1, prompts=3, size=32, frames=4)
    assert "fewer have other prompts: 1 are in one only" in one_error(
        capsys, "make", sharpest, str(other), *out
    )
    longer = write_demo(tmp_path, "longer", 0.1, prompts=4, size=32, frames=6)
    shutil.copy(runs / "sharpest" / "videos.csv", longer / "videos.csv")
    assert "differ in length (sharpest: 4 at 8 fps, longer: 6 at 8 fps)" in one_error(
        capsys, "make", sharpest, str(longer), *out
    )
    wide = tmp_path / "wide"
    shutil.copytree(runs / "noisy", wide)
    write_video(wide / "001.mp4", torch.zeros(4, 3, 32, 48), fps=8)
    assert "differ in shape (sharpest: 32 x 32, wide: 48 x 32)" in one_error(
        capsys, "make", sharpest, str(wide), *out
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(runs / "noisy", damaged)
    (damaged / "002.mp4").unlink()
    assert "002.mp4" in one_error(capsys, "make", sharpest, str(damaged), *out)
    noisy = str(runs / "noisy")
    assert "questions has 'beauty'" in one_error(
        capsys, "make", sharpest, noisy, *out, "--questions", "beauty"
    )
    assert "planted is 4" in one_error(
        capsys, "make", sharpest, noisy, *out, "--pairs", "4", "--planted", "4", "--repeats", "0"
    )
    assert "more than max_mb=0.001" in one_error(
        capsys, "make", sharpest, noisy, *out, *small, "--max-mb", "0.001"
    )
    with pytest.raises(SystemExit):
        main(["make", sharpest, noisy, *out, *small, "--post", "ftp://x"])
    assert "post is 'ftp://x'; give an address" in capsys.readouterr().err
    (tmp_path / "texts.yaml").write_text("title: only\n")
    texts = ["--texts", str(tmp_path / "texts.yaml")]
    assert "it must have title, consent" in one_error(capsys, "make", sharpest, noisy, *out, *texts)
    assert not (tmp_path / "out").exists()


# ---- answers --------------------------------------------------------------------------------------------------------


def population(key: Key, **values: float) -> Population:
    strengths = np.linspace(1.2, -1.2, len(key.systems))
    return Population(strengths={q: tuple(strengths) for q in key.questions}, **values)


def test_bad_answers_are_counted_and_one_is_never_two(made: Path, tmp_path: Path):
    key = read_key(made / "key.json")
    good, other, idle = simulate_answers(key, population(key), 3, np.random.default_rng(0))
    answers = list(good.answers.values())
    text = to_file(key, good.id, good.list, answers)
    texts = {
        "a.json": text,
        "again.json": text,
        "cut.json": text[: len(text) // 2],
        "edited.json": text.replace('"choice": "left"', '"choice": "right"', 1),
        "foreign.json": text.replace(key.study, "0" * 16),
        "list.json": json.dumps([1, 2]),
        "huge.json": "[" * 100_000,
        "idle.json": to_file(key, idle.id, idle.list, []),
        "odd.json": to_file(key, other.id, other.list, [replace(answers[0], trial=99)]),
    }
    for name, content in texts.items():
        (tmp_path / name).write_text(content)
    collected = read_answers(key, sorted(tmp_path.glob("*.json")))
    reasons = {Path(where).name: reason for where, reason in collected.refused.items()}
    assert set(reasons) == {"cut.json", "edited.json", "foreign.json", "list.json", "huge.json", "odd.json"}
    assert "checksum" in reasons["edited.json"] and "is of study" in reasons["foreign.json"]
    assert "trial is 99" in reasons["odd.json"]
    assert collected.raters[good.id].answers == good.answers and collected.duplicates == len(answers)
    assert check_rater(key, collected.raters[idle.id], Rules()).excluded == "answered nothing"
    with pytest.raises(ValueError, match="no answers can be taken"):
        read_answers(key, [tmp_path / "cut.json"])


def test_the_log_of_the_server_is_read_with_revisions_and_a_torn_end(made: Path, tmp_path: Path):
    key, rater = read_key(made / "key.json"), "ab" * 16
    head = {"study": key.study, "rater": rater, "list": 0}
    said = [
        {"trial": 0, "question": "quality", "choice": c, "ms": 5, "n": n}
        for n, c in ((0, "left"), (1, "tie"), (1, "tie"))
    ]
    text = "".join(json.dumps({**head, **more}) + "\n" for more in ({}, *said))
    (tmp_path / "answers.jsonl").write_text(text + '{"study": "tor')
    collected = read_answers(key, [tmp_path / "answers.jsonl"])
    assert collected.raters[rater].answers[0, "quality"].choice == "tie"
    assert (collected.duplicates, collected.revised, collected.refused) == (1, 1, {})


def test_an_edited_key_is_refused(made: Path, tmp_path: Path):
    text = (made / "key.json").read_text()
    (tmp_path / "key.json").write_text(text.replace('"kind": "planted"', '"kind": "pair"', 1))
    with pytest.raises(ValueError, match="was edited since"):
        read_key(tmp_path / "key.json")


def test_the_careless_are_excluded_and_others_are_not():
    key = plain_key(3, 8, 40, 16, ["quality", "motion"], 0, planted=3, repeats=3)
    raters = simulate_answers(key, population(key, careless=0.25), 40, np.random.default_rng(1))
    checked = [check_rater(key, rater, Rules()) for rater in raters]
    assert sum(bool(one.excluded) for one in checked[:10]) >= 9 and not any(
        one.excluded for one in checked[10:]
    )
    assert "of 6 planted pairs right" in next(one.excluded for one in checked if one.excluded)
    left = {place: replace(a, choice="left") for place, a in raters[20].answers.items()}
    always = check_rater(key, replace(raters[20], answers=left), Rules(min_planted=0.0))
    assert always.flipped == always.repeated == 6 and "repeated answers" in always.excluded


def test_the_whole_analysis_recovers_what_was_planted(
    made: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    key = read_key(made / "key.json")
    people = population(key, careless=0.2, side=0.8, rater_sd=0.2, prompt_sd=0.2)
    for rater in simulate_answers(key, people, 30, np.random.default_rng(2)):
        (tmp_path / f"{rater.id}.json").write_text(
            to_file(key, rater.id, rater.list, list(rater.answers.values()))
        )
    for number, name in enumerate(("sharpest", "grainy", "noisy")):
        values = {"psnr": -number, "lpips": -number, "speed": 1}
        scores = [
            Score(metric=m, value=float(v), prompt=prompt.name)
            for prompt in key.prompts
            for m, v in values.items()
        ]
        write_scores(runs / name / "scores.jsonl", scores)
    assert main(["analyse", str(tmp_path), "--study", str(made), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert said.count("excluded: ") >= 5 and re.search(r"2[3-5] raters, [5-7] excluded", said)
    found = list(csv.DictReader((tmp_path / "r.csv").open()))
    strength = {(r["question"], r["item"]): float(r["value"]) for r in found if r["figure"] == "strength"}
    for question in ("quality", "motion"):
        ordered = sorted(("sharpest", "grainy", "noisy"), key=lambda name: -strength[question, name])
        assert ordered == ["sharpest", "grainy", "noisy"]
    side = next(r for r in found if r["figure"] == "right_side")
    assert float(side["low"]) > 0.5
    accuracy = {
        r["item"]: float(r["value"])
        for r in found
        if r["figure"] == "accuracy" and r["question"] == "quality"
    }
    assert set(accuracy) == {PEOPLE, "psnr", "lpips"} and accuracy["psnr"] == pytest.approx(
        1 - accuracy["lpips"], abs=0.03
    )
    assert accuracy["psnr"] > 0.7
    page = (tmp_path / "r.html").read_text()
    assert "Raters lean to the right side" in page and "sharpest <span" in page and "<script" not in page
    assert r"\begin{tabular}{lrr}" in (tmp_path / "r.tex").read_text()


def test_the_power_command_writes_its_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "power.html"
    words = ["--raters", "10", "--prompts", "8", "--pairs", "12", "--out", str(out)]
    assert main(["power", *words]) == 0
    assert "10 raters, 8 prompts: 0." in capsys.readouterr().out and "<svg" in out.read_text()
    assert main(["power", *words, "--systems", "5", "--design", "blocks"]) == 0
    page = out.read_text()
    assert (
        "blocks of 3 of <b>5</b> systems" in page and ">8 prompts</th>" in page and ">4 prompts" not in page
    )
    assert "detect is 0.4" in one_error(capsys, "power", "--detect", "0.4")
