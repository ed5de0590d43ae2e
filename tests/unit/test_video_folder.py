"""A folder of videos with its CSV file: what a run writes, and what another tool may give."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.folder import VideoFolder, write_videos

torch.set_num_threads(1)


def cases() -> dict[str, Case]:
    found = {}
    for index in range(2):
        e = Toyworld(ToyworldConfig(size=32, frames=3, split="dev"))[index]
        common = {"image": e.image, "caption": e.caption, "subject": e.subject, "prompt": e.key}
        own = Case(video=e.video, **common, truth=e.video, identity=e.identity, noise_seed=index)
        found[f"{index}.mp4"] = own
        found[f"{index}-none.mp4"] = Case(video=-e.video, **common, truth=e.video, control="none")
    return found


def test_what_is_written_is_read(tmp_path: Path):
    written = cases()
    for name, case in written.items():
        write_video(tmp_path / name, case.video, fps=8)
    write_videos(tmp_path, written, fps=8)
    folder = VideoFolder(tmp_path / "videos.csv")
    assert [row.video for row in folder.rows] == list(written)
    for read, case in zip(folder, written.values(), strict=True):
        assert (read.caption, read.subject, read.prompt) == (case.caption, case.subject, case.prompt)
        assert (read.noise_seed, read.control) == (case.noise_seed, case.control)
        assert (read.image - case.image).abs().max() < 0.01
        assert read.video.shape == case.video.shape and (read.video - case.video).abs().mean() < 0.1
        assert (read.truth - case.truth).abs().mean() < 0.1
        assert json.dumps(read.identity) == json.dumps(case.identity)


def write_csv(folder: Path, *lines: str, head: str = "video,image,caption,subject") -> VideoFolder:
    (folder / "mine.csv").write_text("\n".join([head, *lines]) + "\n")
    return VideoFolder(folder / "mine.csv")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", torch.rand(3, 3, 24, 32) * 2 - 1, fps=8)
    write_video(tmp_path / "short.mp4", torch.rand(2, 3, 24, 32) * 2 - 1, fps=8)
    Image.fromarray(np.full((40, 30, 4), 255, np.uint8)).save(tmp_path / "rgba.png")
    Image.fromarray(np.full((40, 30), 128, np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return tmp_path


def test_images_of_any_kind_and_captions_with_commas(files: Path):
    folder = write_csv(files, 'a.mp4,rgba.png,"a cat, running",cat', "a.mp4,grey.png,a dog,")
    assert folder[0].image.shape == (3, 32, 32) and folder[0].caption == "a cat, running"
    assert folder[0].prompt == "rgba.png: a cat, running" != folder[1].prompt
    assert folder[1].image.shape == (3, 32, 32) and folder[1].subject == ""


@pytest.mark.parametrize(
    ("line", "head", "message"),
    [
        ("a.mp4,a", "video,caption", "has no column image, subject.*may name prompt,noise_seed"),
        ("a.mp4,,a cat,cat", None, "line 2: image is empty"),
        ("../a.mp4,rgba.png,a cat,cat", None, "line 2, folder=.*path '../a.mp4' leads out|path '../a.mp4' leads out"),
        ("a.mp4,/etc/passwd,a cat,cat", None, "leads out"),
        ("a.mp4,rgba.png,a cat,cat,best", "video,image,caption,subject,control", "control is 'best'"),
        ("a.mp4,rgba.png,a cat,cat,x", "video,image,caption,subject,noise_seed", "noise_seed is 'x'"),
    ],
)  # fmt: skip
def test_a_wrong_list_is_one_error(files: Path, line: str, head: str | None, message: str):
    with pytest.raises(ValueError, match=message):
        write_csv(files, line, **({"head": head} if head else {}))


def test_an_empty_list_is_an_error(files: Path):
    with pytest.raises(ValueError, match="lists no videos"):
        write_csv(files)
    with pytest.raises(ValueError, match="cannot be read"):
        VideoFolder(files / "none.csv")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("broken.mp4,rgba.png,a cat,cat,,", "broken.mp4: "),
        ("missing.mp4,rgba.png,a cat,cat,,", "missing.mp4: "),
        ("a.mp4,missing.png,a cat,cat,,", "a.mp4: .*missing.png"),
        ("a.mp4,rgba.png,a cat,cat,short.mp4,", "a.mp4: .*same frames and size"),
        ('a.mp4,rgba.png,a cat,cat,,"{""shape"": ""star""}"', "a.mp4: identity is not one of the toy world"),
        ("a.mp4,rgba.png,a cat,cat,,{", "a.mp4: "),
    ],
)
def test_a_broken_video_is_an_error_of_its_own(files: Path, line: str, message: str):
    head = "video,image,caption,subject,truth,identity"
    folder = write_csv(files, line, "a.mp4,rgba.png,a cat,cat,,", head=head)
    with pytest.raises(ValueError, match=message):
        folder[0]
    assert folder[1].video.shape == (3, 3, 24, 32)
