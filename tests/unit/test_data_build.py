"""The build of a data set: its filters on planted defects, its stages, and its files."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_booth.commands.data import main
from dit_booth.data.build import BuildSettings, FilterSettings, Report, build, inspect
from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.filters import decide, mark_duplicates
from dit_booth.data.build.nouns import by_rules, find_nouns, singulars
from dit_booth.data.build.settings import NounSettings, SegmentSettings, ShotSettings
from dit_booth.data.build.stages import run_stage
from dit_booth.data.build.write import group_of, pair_across, read_manifest
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.testing.clips import DEFECTS, write_clips

torch.set_num_threads(1)
FRAMES, SIZE = 12, (120, 160)
PLAN = ("none", "none", *DEFECTS)


def settings_of(root: Path, **changes: object) -> BuildSettings:
    filters = FilterSettings(min_frames=9, watermark=str(root / "watermark.png"))
    settings = BuildSettings(
        videos=str(root / "videos"),
        captions=str(root / "captions.csv"),
        out=str(root / "set"),
        workers=1,
        shots=ShotSettings(split=False),
        segment=SegmentSettings(by="masks", folder=str(root / "masks")),
        filters=filters,
    )
    return replace(settings, **changes)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    write_clips(PLAN, root, frames=FRAMES, size=SIZE, fps=6)
    return root


@pytest.fixture(scope="module")
def built(clips: Path) -> Report:
    return build(settings_of(clips))


def test_every_planted_defect_is_found_and_no_sound_clip_is_dropped(built: Report) -> None:
    reasons = {c.videoid: c.reasons for c in built.candidates if c.subject != "ground"}
    for number, defect in enumerate(PLAN):
        found = reasons[f"clip{number}"]
        assert (defect in found) if defect != "none" else not found, (number, defect, found)


def test_the_report_counts_and_names(built: Report, clips: Path) -> None:
    lines = list(built.lines())
    assert lines[0] == f"3 triplets of {len(built.candidates)} candidates"
    assert any(line.split()[:2] == ["unreadable", "1"] and "truncated" in line for line in lines)
    written = (clips / "set" / "report.txt").read_text().splitlines()
    assert written[: len(lines)] == lines and [line.split(":")[0] for line in written[len(lines) :]] == [
        "", "unreadable", f"  clip{PLAN.index('unreadable')}"
    ]  # fmt: skip


def test_the_set_is_what_the_reader_reads(built: Report, clips: Path) -> None:
    data = Triplets(TripletsConfig(root=str(clips / "set"), frames=3, stride=4, size=32))
    assert len(data) == len(built.accepted) == 3 and not data.broken
    made = {data[i].key: data[i] for i in range(3)}
    assert set(made) == {"clip0", "clip1", "clip2"}
    assert all(0.01 < example.mask[0].float().mean() < 0.6 for example in made.values())


def test_the_manifest_has_a_row_for_every_candidate(built: Report, clips: Path) -> None:
    rows = read_manifest(clips / "set")
    assert rows == list(built.candidates)
    import duckdb

    sql = f"select count(*) from '{clips / 'set' / 'manifest.parquet'}' where accepted and seconds = 2.0"
    assert duckdb.sql(sql).fetchall() == [(3,)]


def test_another_threshold_redoes_no_stage_and_the_same_build_nothing(
    built: Report, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("dit_booth.data.build.build")

    def refuse(*_: object, **__: object) -> list[Candidate]:
        raise AssertionError("a stage ran again")

    for name in ("find_shots", "find_nouns", "find_mask", "measure"):
        monkeypatch.setattr(module, name, refuse)
    assert build(settings_of(clips)).candidates == built.candidates
    strict = settings_of(clips, filters=replace(settings_of(clips).filters, min_area=0.99))
    assert not build(strict).accepted
    assert len(build(settings_of(clips)).accepted) == 3


def test_a_video_is_cut_into_its_shots_and_prompts_cross_them(clips: Path, tmp_path: Path) -> None:
    number = PLAN.index("cut")
    name, noun = f"clip{number}", next(n for n in _nouns(clips, number) if n != "ground")
    (tmp_path / "captions.csv").write_text(f"video,caption\n{name}.mp4,one {noun}\n")
    masks = tmp_path / "masks"
    for folder in (name, f"{name}_{FRAMES // 2}-{FRAMES}"):
        (masks / folder).mkdir(parents=True)
        for file in (clips / "masks" / name).iterdir():
            (masks / folder / file.name).write_bytes(file.read_bytes())
    loose = FilterSettings(min_frames=4, min_area=0, max_area=1, max_sides=4, min_motion=0, min_sharpness=0)
    settings = settings_of(
        clips,
        captions=str(tmp_path / "captions.csv"),
        out=str(tmp_path / "set"),
        shots=ShotSettings(),
        segment=SegmentSettings(by="masks", folder=str(masks)),
        filters=loose,
        cross_pair=True,
    )
    report = build(settings)
    first, second = report.accepted
    assert (first.start, first.end, second.start, second.end) == (0, 6, 6, 12)
    assert (first.image_from, second.image_from) == (second.videoid, first.videoid)
    data = Triplets(TripletsConfig(root=str(tmp_path / "set"), frames=2, stride=2, size=32))
    own = Triplets(TripletsConfig(root=str(tmp_path / "set"), frames=2, stride=2, size=32, cross_pair=False))
    assert (data[0].video == own[0].video).all()
    assert (data[0].image == own[1].image).all() and not (data[0].image == own[0].image).all()


def _nouns(clips: Path, number: int) -> list[str]:
    caption = (clips / "captions.csv").read_text().splitlines()[number + 1].split(",")[1]
    return by_rules(caption)


# Nouns


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("a jeep car is moving on the road", ["car", "road"]),
        ("A rabbit is eating a watermelon", ["rabbit", "watermelon"]),
        ("Two polar bears walking on the ice, aerial view", ["bears", "ice"]),
        ("Happy dog runs through a field", ["dog", "field"]),
        ("Slow motion of a man surfing", ["man"]),
        ("the", []),
    ],
)
def test_the_rules_find_the_nouns_of_captions(caption: str, nouns: list[str]) -> None:
    assert by_rules(caption) == nouns


def test_classes_and_given_subjects() -> None:
    row = Candidate(videoid="a", page_dir="p", caption="two dogs and a cat on a road", video="a.mp4")
    chosen = find_nouns(row, settings=NounSettings(classes=("dog", "person")))
    assert [c.subject for c in chosen] == ["dogs"]
    with pytest.raises(ValueError, match="no noun of bird"):
        find_nouns(row, settings=NounSettings(classes=("bird",)))
    assert find_nouns(replace(row, subject="Cat"), settings=NounSettings())[0].subject == "Cat"
    with pytest.raises(ValueError, match="does not contain"):
        find_nouns(replace(row, subject="car"), settings=NounSettings())
    assert "child" in singulars("children") and group_of("Dogs") == "dog" and group_of("glass") == "glass"


def test_spacy_is_an_option(tmp_path: Path) -> None:
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed (extra [nouns])")
    model = spacy.blank("en")  # knows three words: a parser's model is a download
    rules = model.add_pipe("attribute_ruler")
    for word, pos, role in (("dog", "NOUN", "nsubj"), ("field", "NOUN", "pobj"), ("rex", "PROPN", "nsubj")):
        rules.add([[{"LOWER": word}]], {"POS": pos, "DEP": role})
    model.to_disk(tmp_path / "model")
    settings = NounSettings(tagger="spacy", model=str(tmp_path / "model"))
    caption = "Rex, a happy Dog, runs in the field"
    row = Candidate(videoid="a", page_dir="p", caption=caption, video="a.mp4")
    assert [c.subject for c in find_nouns(row, settings=settings)] == ["Dog", "field"]
    row = Candidate(videoid="a", page_dir="p", caption="a dog", video="a.mp4")
    with pytest.raises(ValueError, match="no_such_model"):
        find_nouns(row, settings=NounSettings(tagger="spacy", model="no_such_model"))


# Stages


def explode(candidate: Candidate) -> list[Candidate]:
    """Kill the process at one clip, fail at another, pass the rest."""
    if candidate.videoid == "killer":
        os._exit(1)
    if candidate.videoid == "odd":
        raise ArithmeticError("odd")
    return [replace(candidate, end=7)]


def test_a_clip_that_kills_its_process_is_rejected_and_the_others_pass(tmp_path: Path) -> None:
    names = ["a", "killer", "odd", "b"]
    rows = [Candidate(videoid=n, page_dir="p", caption="c", video=n) for n in names]
    out = run_stage("x", rows, explode, settings=0, folder=tmp_path, workers=2)
    assert [c.end for c in out] == [7, 0, 0, 7]
    assert "kills the process" in out[1].details and "ArithmeticError: odd" in out[2].details
    assert out[1].reasons == out[2].reasons == ("unreadable",)


def test_a_stage_that_was_cut_off_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    rows = [Candidate(videoid=n, page_dir="p", caption="c", video=n) for n in "abc"]
    seen: list[str] = []

    def work(candidate: Candidate) -> list[Candidate]:
        seen.append(candidate.videoid)
        return [replace(candidate, end=3)]

    first = run_stage("x", rows, work, settings=0, folder=tmp_path, workers=1)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    assert run_stage("x", rows, work, settings=0, folder=tmp_path, workers=1) == first
    assert seen == ["a", "b", "c", "c"]
    assert [json.loads(line)["rows"][0]["end"] for line in file.read_text().splitlines()] == [3, 3, 3]


def test_duplicates_are_within_the_distance_and_the_first_stays() -> None:
    rng = np.random.default_rng(0)
    base = int.from_bytes(rng.bytes(16))
    near, far = base ^ (0b11 << 40) ^ (1 << 100), base ^ (0b1111 << 8)
    hashes = {"a": base, "near": near, "far": far}
    rows = [
        Candidate(videoid=n, page_dir="p", caption="c", video=n, hash=f"{h:032x}") for n, h in hashes.items()
    ]
    marked = mark_duplicates(rows, 3)
    assert [c.reasons for c in marked] == [(), ("duplicate",), ()] and marked[1].details == "looks like a"
    assert [c.reasons for c in mark_duplicates(rows, 2)] == [(), (), ()]
    off = BuildSettings(
        videos="v", captions="c", out="o", filters=FilterSettings(max_distance=-1, min_area=0)
    )
    sound = {"change": 9.0, "motion": 1.0, "sharpness": 99.0}
    assert not any(c.reasons for c in decide([replace(c, **sound) for c in rows], off))


def test_pairs_need_two_shots_of_one_video_and_subject() -> None:
    def row(name: str, video: str, subject: str) -> Candidate:
        return Candidate(videoid=name, page_dir="p", caption="c", video=video, subject=subject)

    rows = [row("a", "v", "dog"), row("b", "v", "Dog"), row("c", "v", "cat"), row("d", "w", "dog")]
    assert [c.image_from for c in pair_across(rows)] == ["b", "a", "", ""]


# The command


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bulid"]) == 2
    assert "nearest: build" in capsys.readouterr().err
    words = ["build", "--videos", str(tmp_path / "none"), "--captions", "c", "--out", str(tmp_path / "o")]
    assert main([*words, "--segment.folder", str(tmp_path)]) == 1
    assert "is not a folder" in capsys.readouterr().err


# The page


def test_the_page_shows_every_measured_clip_and_is_self_contained(
    built: Report, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(clips / "set"), "--workers", "1"]) == 0
    page = (clips / "set" / "inspect.html").read_text()
    assert str(clips / "set" / "inspect.html") in capsys.readouterr().out
    assert "src=http" not in page and "@import" not in page and 'src="http' not in page
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    measured = [c for c in built.candidates if c.hash]
    assert [row["videoid"] for row in data["rows"]] == [c.videoid for c in measured]
    assert all(row["clip"].startswith("data:image/webp") and row["still"] for row in data["rows"])
    assert {dial["setting"] for dial in data["dials"]} <= set(vars(settings_of(clips).filters))
    assert "truncated" in page, "what was rejected before is listed"
    first, second = (measured[0].videoid, measured[1].videoid)
    assert main(["inspect", str(clips / "set"), "--workers", "1", "--limit", "1"]) == 0
    page = (clips / "set" / "inspect.html").read_text()
    assert f'"{first}"' in page and f'"{second}"' not in page and "are not on this page" in page


def test_a_caption_cannot_end_the_pages_script(tmp_path: Path) -> None:
    from markupsafe import Markup

    assert "</script><b>" not in inspect.embed({"caption": "</script><b>"})
    assert isinstance(inspect.embed({}), Markup)


def test_a_folder_that_is_no_data_set_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "has no such file" in capsys.readouterr().err


def test_a_set_that_was_not_built_has_a_page(built: Report, clips: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(clips / "set", root, ignore=shutil.ignore_patterns("build", "manifest.parquet"))
    broken = root / "videos" / "clips" / "clip1.mp4"
    broken.write_bytes(broken.read_bytes()[:-2000])
    page = inspect.make_page(root, format="videobooth", limit=9, workers=1)
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    of_build = {c.videoid: c for c in built.accepted}
    assert {row["videoid"] for row in data["rows"]} == set(of_build) - {"clip1"} and "truncated" in page
    for row in data["rows"]:
        wanted = of_build[row["videoid"]]
        assert (row["area"], row["sides"]) == (wanted.area, wanted.sides)
        assert row["motion"] == pytest.approx(wanted.motion) and row["clip"].startswith("data:image/webp")


def test_pictures_have_a_page_without_measures_of_motion(tmp_path: Path) -> None:
    for number, side in enumerate((8, 16)):
        picture = np.random.default_rng(number).integers(0, 255, (32, 32, 3)).astype(np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[8 : 8 + side, 8 : 8 + side] = 255
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / f"{number}.mask.png")
        (tmp_path / f"{number}.txt").write_text("a box\nbox")
    page = inspect.make_page(tmp_path, format="images", limit=9, workers=1)
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert [round(row["area"], 3) for row in data["rows"]] == [0.062, 0.25]
    assert {"area"} <= {dial["field"] for dial in data["dials"]} <= {"area", "sharpness"}
