"""Broken, unusual and hostile input of a build: each is counted and named in its report, and the build goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from disk import full_disk
from odd_videos import ramp, write, write_no_frames, write_sound
from PIL import Image

from dit_booth.data.build import BuildSettings, FilterSettings, Report, build
from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.captions import read_captions
from dit_booth.data.build.settings import SegmentSettings
from dit_booth.data.build.stages import run_stage
from dit_booth.data.build.write import COLUMN_TYPES, write_clip
from dit_booth.data.parquet import write_parquet
from dit_booth.data.readers.triplets import Triplets, TripletsConfig

torch.set_num_threads(1)
MASKED = ("fine", "odd", "turned", "deep", "variable", "two", "large_mask")
WRONG = {
    "truncated": "truncated",
    "empty": "not a readable video",
    "no_frames": "not a readable video",
    "sound": "no video stream",
    "interlaced": "is interlaced",
    "alpha": "alpha channel",
    "link": "leads out of",
    "other_mask": "of other proportions",
    "no_subject": "names no subject",
    "no_json": "finds no 'car'",
    "bad_json": "not a list of objects",
}


def add_mask(root: Path, name: str, height: int, width: int, labels: tuple[str, ...] = ("car",)) -> None:
    folder = root / "masks" / name
    folder.mkdir(parents=True)
    entries: list[dict[str, object]] = [{"value": 0, "label": "background"}]
    for value, label in enumerate(labels, 1):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 4 : width // 2] = 255
        Image.fromarray(mask).save(folder / f"mask_{value}.png")
        box = [8, 8, 16, 16]
        entries.append({"value": value, "label": label, "logit": value / 10, "box": box})
    (folder / "mask.json").write_text(json.dumps(entries))


def make_videos(root: Path) -> None:
    videos = root / "videos"
    videos.mkdir(parents=True)
    for name in ("fine", "two", "large_mask", "other_mask", "no_subject", "no_json", "bad_json"):
        write(videos / f"{name}.mp4", ramp(6))
    write(videos / "odd.mp4", ramp(6, 33, 47), pixels="yuv444p")
    write(videos / "turned.mp4", ramp(6), rotation=90)
    write(videos / "deep.mp4", ramp(6), pixels="yuv420p10le")
    write(videos / "variable.mp4", ramp(6), stamps=[0, 30, 400, 410, 900, 905])
    write(videos / "interlaced.mp4", ramp(6), options={"x264-params": "interlaced=1"})
    write(videos / "alpha.mov", ramp(6), codec="qtrle", pixels="argb")
    write_sound(videos / "sound.mp4")
    write_no_frames(videos / "no_frames.mp4")
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "truncated.mp4").write_bytes((videos / "fine.mp4").read_bytes()[:-300])
    shutil.copy(videos / "fine.mp4", root / "outside.mp4")
    (videos / "link.mp4").symlink_to(root / "outside.mp4")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    make_videos(root)
    sizes = {"odd": (33, 47), "turned": (48, 32), "large_mask": (64, 96), "other_mask": (40, 40)}
    for name in (*MASKED, "other_mask", "bad_json"):
        add_mask(
            root, name, *sizes.get(name, (32, 48)), labels=("car", "road") if name == "two" else ("car",)
        )
    (root / "masks" / "no_subject").mkdir()
    (root / "masks" / "no_subject" / "mask.json").write_text('[{"value": 0, "label": "background"}]')
    (root / "masks" / "bad_json" / "mask.json").write_text("{")
    files = [*(f"{name}.mp4" for name in (*MASKED, *WRONG) if name != "alpha"), "alpha.mov"]
    text = "\ufeffvideo,caption\r\n" + "".join(f"{file},a car on the road\r\n" for file in files)
    (root / "captions.csv").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    filters = FilterSettings(min_frames=3, min_area=0, min_motion=0, min_sharpness=0, max_distance=-1)
    return build(
        BuildSettings(
            videos=str(root / "videos"),
            captions=str(root / "captions.csv"),
            out=str(root / "set"),
            workers=1,
            segment=SegmentSettings(by="masks", folder=str(root / "masks")),
            filters=filters,
        )
    )


def rows(report: Report, name: str) -> list[Candidate]:
    return [c for c in report.candidates if c.videoid == name]


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_named_with_the_reason(report: Report, name: str) -> None:
    found = rows(report, name)
    assert found and all(c.reasons for c in found)
    assert any(WRONG[name] in c.details for c in found), [c.details for c in found]


@pytest.mark.parametrize("name", MASKED)
def test_what_is_unusual_and_sound_becomes_a_triplet(report: Report, root: Path, name: str) -> None:
    (car, *_) = [c for c in rows(report, name) if c.subject == "car"]
    assert not car.reasons, car
    data = Triplets(TripletsConfig(root=str(root / "set"), frames=2, size=16))
    example = next(data[i] for i, item in enumerate(data.items) if item.row.key == name)
    assert 0.02 < example.mask[0].float().mean() < 0.2


def test_all_subjects_of_a_clip_are_kept_and_it_is_listed_once(report: Report, root: Path) -> None:
    assert [c.subject for c in rows(report, "two") if not c.reasons] == ["car", "road"]
    entries = json.loads((root / "set" / "masks" / "two" / "mask.json").read_text())
    assert [entry["label"] for entry in entries] == ["background", "car", "road"]
    lists = "".join(file.read_text() for file in (root / "set").glob("*.csv"))
    assert lists.count("two,") == 1


def test_every_rejected_video_is_counted(report: Report) -> None:
    lines = list(report.lines())
    assert lines[0].startswith(f"{len(MASKED) + 1} triplets of ")
    counted = sum(int(line.split("  ")[-2].split()[-1]) for line in lines[1:] if "unreadable" in line)
    assert counted == sum("unreadable" in c.reasons for c in report.candidates) >= 8


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"video,caption\n../outside.mp4,a car\n", "leads out of"),
        (b"video,caption\n/etc/passwd,a car\n", "leads out of"),
        (b"videoid,page_dir,name\nfine,..,a car\n", "leads out of"),
        (b"videoid,page_dir,name\n../fine,.,a car\n", "leads out of"),
        (b"videoid,page_dir,name\nx/fine,.,a car\n", "is no name of a file"),
        (b"video,caption\nfine.mp4,caf\xe9\n", "is not UTF-8"),
        (b"video,caption\nfine.mp4,\n", "has no caption"),
        (b"video,caption\nfine.mp4\n", "has no caption"),
        (b"video,caption\nnone.mp4,a car\n", "no such file"),
        (b"video,caption\nfine.mp4,a car\nfine.mp4,a car\n", "stands twice"),
    ],
)
def test_lines_of_captions_that_cannot_be_used(
    root: Path, tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    wrong = read_captions(tmp_path / "list.csv", root / "videos")[-1]
    assert wrong.reasons == ("unreadable",) and words in wrong.details and "line " in wrong.details


def test_lists_that_cannot_be_used_at_all(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,text\na,b\n")
    with pytest.raises(ValueError, match=r"has the columns path, text; it needs video,caption"):
        read_captions(tmp_path / "list.csv", root / "videos")
    with pytest.raises(ValueError, match=r"none\.csv cannot be read"):
        read_captions(tmp_path / "none.csv", root / "videos")


def test_a_full_disk_stops_the_build_rejects_no_clip_and_the_same_build_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (6, 32, 48, 3)).astype(np.uint8))
    row = Candidate(videoid="a_1-6", page_dir="p", caption="c", video="a.mp4", start=1, end=6)
    work = partial(write_clip, videos=str(tmp_path), out=str(tmp_path / "set"))
    stage = partial(run_stage, "clips", [row], work, settings=0, folder=tmp_path / "build", workers=1)
    with full_disk(2000), pytest.raises(OSError, match="too large"):
        stage()
    assert not list((tmp_path / "set").rglob("*.*"))
    (done,) = stage()
    assert not done.reasons and (tmp_path / "set" / "videos" / "p" / "a_1-6.mp4").is_file()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"videoid": "a" * 4000}) + "\n")
    with full_disk(100), pytest.raises(OSError, match=r"table\.parquet cannot be written"):
        write_parquet(tmp_path / "rows.jsonl", tmp_path / "table.parquet", COLUMN_TYPES)


def test_lists_of_the_users_own_are_neither_removed_nor_taken_for_the_sets(
    root: Path, report: Report, tmp_path: Path
) -> None:
    settings = BuildSettings(
        videos=str(root / "videos"), captions=str(tmp_path / "list.csv"), out=str(tmp_path)
    )
    (tmp_path / "list.csv").write_text("video,caption\nfine.mp4,a car\n")
    with pytest.raises(ValueError, match=r"list\.csv', which lies in out"):
        build(settings)
    shutil.copytree(root / "set", tmp_path / "set")
    (tmp_path / "set" / "notes.csv").write_text("a,b\n")
    (tmp_path / "set" / "old.csv").write_text("videoid,page_dir,name,image_from\n")
    build(replace(settings, out=str(tmp_path / "set"), segment=SegmentSettings(folder=str(root / "masks"))))
    assert {file.name for file in (tmp_path / "set").glob("*.csv")} == {"notes.csv"}
