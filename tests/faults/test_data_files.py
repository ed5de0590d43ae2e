"""Broken and hostile files: each is one error that names the file, the numbers and the fix."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_booth.data.image_files import read_entries, read_mask, read_rgb
from dit_booth.data.image_prompt import load_image_prompt, pixel_box, prepare
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.video import probe, read_video, write_gif, write_video

torch.set_num_threads(1)


def noise(frames: int = 12, side: int = 32) -> torch.Tensor:
    return torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def refused(call, *words: str) -> str:
    """Assert that `call` raises a ValueError with these words; give the message."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    return message


# Videos


@pytest.mark.parametrize("share", [0.6, 0.8, 0.98])
def test_a_truncated_video_is_refused_even_where_its_beginning_is_whole(tmp_path: Path, share):
    path = tmp_path / "clip.mp4"
    write_video(path, noise(), fps=10)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    for call in (lambda: probe(path), lambda: read_video(path), lambda: read_video(path, frames=1)):
        refused(call, "clip.mp4", "truncated", "expected 12", "replace it")


@pytest.mark.parametrize("content", [b"", b"no video at all " * 500, b"\x00" * 4096])
def test_junk_is_no_video(tmp_path: Path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    refused(lambda: read_video(path), "clip.mp4", "not a readable video")


def test_a_missing_file_and_a_folder_are_no_videos(tmp_path: Path):
    refused(lambda: read_video(tmp_path / "none.mp4"), "none.mp4", "no such file")
    refused(lambda: probe(tmp_path), "no such file")  # a folder


def test_damage_within_a_video_is_no_silent_loss(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    write_video(path, noise(), fps=10)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    refused(lambda: read_video(path), "clip.mp4", "replace")


@pytest.mark.parametrize(
    "window", [{"frames": 13}, {"frames": 4, "stride": 4}, {"start": 10, "frames": 3}, {"start": 12}]
)
def test_more_frames_than_there_are(tmp_path: Path, window):
    path = tmp_path / "clip.mp4"
    write_video(path, noise(), fps=10)
    refused(
        lambda: read_video(path, **window),
        "clip.mp4",
        "has 12",
        "data.frames",
        "data.triplets.stride",
        "lower",
    )


def test_impossible_windows_and_videos(tmp_path: Path):
    path = tmp_path / "clip.mp4"
    write_video(path, noise(), fps=10)
    refused(lambda: read_video(path, start=-1), "start is -1")
    refused(lambda: read_video(path, frames=0), "frames is 0")
    refused(lambda: read_video(path, stride=0), "stride is 0")
    refused(lambda: write_video(tmp_path / "a.gif", noise(), fps=1), "a.gif", ".mp4")
    refused(lambda: write_video(path, noise()[0], fps=1), "(3, 32, 32)", "f 3 h w")
    refused(lambda: write_video(path, noise() / 0, fps=1), "NaN")
    refused(lambda: write_video(path, noise(), fps=0), "fps is 0")
    refused(lambda: write_gif(path, noise(), fps=1), "clip.mp4", ".gif")
    refused(lambda: write_gif(tmp_path / "a.gif", noise(), fps=60), "fps is 60", "50")
    refused(lambda: write_gif(tmp_path / "a.gif", noise() / 0, fps=1), "NaN")


# Image prompts


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_an_image_that_is_not_rgb(tmp_path: Path, mode):
    path = tmp_path / f"image.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (8, 8)).save(path)
    refused(lambda: load_image_prompt(path, size=8), path.name, f"mode is {mode}", "RGB", "convert")


def test_files_that_are_no_images(tmp_path: Path):
    (tmp_path / "junk.jpg").write_bytes(b"junk" * 100)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    refused(lambda: read_rgb(tmp_path / "junk.jpg"), "junk.jpg", "not a readable image")
    refused(lambda: read_rgb(tmp_path / "cut.png"), "cut.png", "not a readable image")
    refused(lambda: read_rgb(tmp_path / "none.jpg"), "none.jpg", "no such file")
    refused(lambda: load_image_prompt(tmp_path, size=8), "no image", "image.jpg")


def test_masks_that_do_not_fit(tmp_path: Path):
    path = tmp_path / "mask_1.png"
    Image.new("L", (60, 40)).save(path)
    refused(lambda: read_mask(path, height=40, width=60), "mask_1.png", "empty")
    Image.new("L", (50, 50), 255).save(path)
    full = np.zeros((50, 50), np.uint8)
    full[5:9] = 1
    Image.fromarray(full).save(path)
    refused(lambda: read_mask(path, height=40, width=60), "50x50", "60x40", "proportions")
    Image.new("RGB", (60, 40)).save(path)
    refused(lambda: read_mask(path, height=40, width=60), "mode is RGB", "one channel")
    image = np.zeros((40, 60, 3), np.uint8)
    refused(lambda: prepare(image, size=8, mask=np.ones((4, 4), bool)), "(4, 4)", "(40, 60)")
    refused(lambda: prepare(image, size=8, mask=np.zeros((40, 60), bool)), "mask is empty")
    refused(lambda: prepare(image, size=0), "image_size is 0")


@pytest.mark.parametrize(
    "box",
    [
        (-2, 0, 10, 10),
        (0, 0, 62, 10),
        (0, 0, 10, 42),
        (9, 0, 9, 10),
        (20, 9, 10, 20),
        (float("nan"), 0, 9, 9),
    ],
)
def test_boxes_outside_the_image(box):
    refused(lambda: pixel_box(box, None, height=40, width=60), "box is", "60x40", "inside the image")


def test_a_box_beside_its_mask():
    mask = np.zeros((40, 60), bool)
    mask[:5, :5] = True
    refused(lambda: pixel_box((20, 20, 30, 30), mask, height=40, width=60), "mask is empty inside the box")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[]",
        "3",
        '[{"label": "car"}]',
        '[{"value": 0, "label": "background"}]',
        '[{"value": 1, "label": "car", "box": [1, 2, 3]}]',
        '[{"value": 1, "label": 5, "box": [1, 2, 3, 4]}]',
        '[{"value": "../1", "label": "car", "box": [1, 2, 3, 4]}]',
    ],
)
def test_a_malformed_mask_list(tmp_path: Path, content):
    (tmp_path / "mask.json").write_text(content)
    refused(lambda: read_entries(tmp_path / "mask.json"), "mask.json")


def test_a_mask_without_its_list_or_its_picture(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask_1.png")
    refused(lambda: load_image_prompt(tmp_path, size=8), "no mask.json", "mask_1.png")
    entry = {"value": 2, "label": "car", "box": [0, 0, 8, 8]}
    (tmp_path / "mask.json").write_text(json.dumps([entry]))
    refused(lambda: load_image_prompt(tmp_path, size=8), "mask_2.png", "no such file")


# Data sets


def dataset(root: Path, *, line: str = "a,web,one car", label: str = "car") -> TripletsConfig:
    write_video(root / "videos" / "web" / "a.mp4", noise(6), fps=10)
    folder = root / "masks" / "a"
    folder.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 255
    Image.fromarray(mask).save(folder / "mask_1.png")
    entry = {"value": 1, "label": label, "logit": 1.0, "box": [8, 8, 20, 20]}
    (folder / "mask.json").write_text(json.dumps([{"value": 0, "label": "background"}, entry]))
    (root / "cars.csv").write_text(f"videoid,page_dir,name\n{line}\n")
    return TripletsConfig(root=str(root), frames=2, stride=2, size=16, max_broken=0)


def test_the_small_data_set_is_sound(tmp_path: Path):
    assert Triplets(dataset(tmp_path))[0].subject == "car"


@pytest.mark.parametrize(
    "line",
    [
        "a,../../etc,one car",
        "a,/etc,one car",
        "../a,web,one car",
        "/etc/passwd,web,one car",
        "a,web/../..,one car",
    ],
)
def test_a_path_that_leaves_the_root_is_never_tolerated(tmp_path: Path, line):
    options = dataset(tmp_path / "root", line=line)
    refused(lambda: Triplets(options), "leads out of data.triplets.root", "correct the CSV")
    tolerant = TripletsConfig(root=options.root, max_broken=10)
    refused(lambda: Triplets(tolerant), "leads out of data.triplets.root")


@pytest.mark.parametrize(
    "name", ["videos/web/a.mp4", "videos/web", "masks/a", "masks/a/mask_1.png", "masks/a/mask.json"]
)
def test_a_link_that_leaves_the_root_is_refused(tmp_path: Path, name):
    options = dataset(tmp_path / "root")
    inside, outside = tmp_path / "root" / name, tmp_path / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    refused(lambda: Triplets(options), "leads out of data.triplets.root")


def test_a_link_within_the_root_is_fine(tmp_path: Path):
    options = dataset(tmp_path)
    (tmp_path / "videos" / "web").rename(tmp_path / "videos" / "store")
    (tmp_path / "videos" / "web").symlink_to(tmp_path / "videos" / "store")
    assert len(Triplets(options)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no column videoid"]),
        (b"videoid,name\na,one car\n", ["no column page_dir", "videoid,page_dir,name"]),
        (b"videoid,page_dir,name\na,web\n", ["line 2", "videoid, page_dir, name"]),
        (b"videoid,page_dir,name\na,web,a car, red\n", ["line 2", "commas"]),
        (b"videoid,page_dir,name\na,web,\xff\xfe\n", ["UTF-8"]),
        (b"videoid,page_dir,name\n", ["no examples"]),
    ],
)
def test_a_malformed_csv(tmp_path: Path, content, words):
    options = dataset(tmp_path)
    (tmp_path / "cars.csv").write_bytes(content)
    refused(lambda: Triplets(options), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"line": "a,web,one cart"}, ["'one cart'", "'car'", "whole words"]),
        ({"label": "bird"}, ["'one car'", "'bird'"]),
        ({"line": "a,other,one car"}, ["a.mp4", "no such file"]),
        ({"line": "b,web,one car"}, ["mask.json", "no such file"]),
        ({"line": "a,web,one car\na,web,the car"}, ["twice"]),
    ],
)
def test_a_broken_example_names_its_fault(tmp_path: Path, changes, words):
    refused(lambda: Triplets(dataset(tmp_path, **changes)), "1 of ", "max_broken is 0", *words)


def test_too_short_a_video(tmp_path: Path):
    options = dataset(tmp_path)
    long = TripletsConfig(root=options.root, frames=4, stride=2, size=16)
    refused(lambda: Triplets(long), "needs 7 frames", "has 6", "data.triplets.stride")


def test_a_file_that_breaks_during_training_is_an_error_with_its_key(tmp_path: Path):
    data = Triplets(dataset(tmp_path))
    (tmp_path / "videos" / "web" / "a.mp4").write_bytes(b"gone")
    refused(lambda: data.at(0, 0), "example a:", "a.mp4", "not a readable video")


def test_options_that_cannot_be(tmp_path: Path):
    refused(lambda: Triplets(TripletsConfig(root=str(tmp_path / "none"))), "data.triplets.root", "none")
    refused(lambda: Triplets(TripletsConfig(root=str(tmp_path), csv="x*.csv")), "data.triplets.csv", "x*.csv")
    for field, value in (("frames", 0), ("stride", 0), ("size", 4), ("image_size", 2), ("max_broken", -1)):
        refused(
            lambda field=field, value=value: TripletsConfig(root="r", **{field: value}),
            f"data.{field} is {value}",
        )
