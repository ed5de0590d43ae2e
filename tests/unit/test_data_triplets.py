"""VideoBooth's data set format: what an example holds, and what is left out."""

import csv
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_booth.config import DataConfig, TripletsOptions
from dit_booth.data.example import Loader
from dit_booth.data.image_prompt import Augment
from dit_booth.data.readers.item import check_caption, fit
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.video import write_video
from dit_booth.models.clip.tokenizer import check_subject

torch.set_num_threads(1)

REAL = Path(__file__).parents[3] / "shared" / "data" / "real_triplets"
RED, BLUE = torch.tensor([0.6, -0.8, -0.8]), torch.tensor([-0.8, -0.6, 0.6])


def clip(frames: int, *, x: int = 20, height: int = 40, width: int = 60) -> torch.Tensor:
    """A red box, 16 high and wide from (x, 12), on blue that brightens from frame to frame."""
    video = BLUE.view(1, 3, 1, 1).expand(frames, 3, height, width).clone()
    video[:, 1] += torch.linspace(0, 0.8, frames).view(frames, 1, 1)
    video[:, :, 12:28, x : x + 16] = RED.view(1, 3, 1, 1)
    return video


def write_triplets(
    root: Path, names: tuple[str, ...] = ("a", "b", "c"), *, frames: int = 12, x: int = 20
) -> Path:
    for name in names:
        write_video(root / "videos" / "web" / f"{name}.mp4", clip(frames, x=x), fps=10)
        folder = root / "masks" / name
        folder.mkdir(parents=True)
        mask = np.zeros((40, 60), np.uint8)
        mask[12:28, x : x + 16] = 255
        Image.fromarray(mask).save(folder / "mask_1.png")
        entry = {"value": 1, "label": "car", "logit": 0.9, "box": [x, 12.0, x + 16.0, 28.0]}
        (folder / "mask.json").write_text(json.dumps([{"value": 0, "label": "background"}, entry]))
    with (root / "cars.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["videoid", "page_dir", "name"])
        rows.writerows([name, "web", f"a red car, number {name}"] for name in names)
    return root


def config(root: Path, **changes) -> TripletsConfig:
    return TripletsConfig(**{"root": str(root), "frames": 3, "stride": 4, "size": 40, **changes})


def near(picture: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    """Where a picture `3 h w` has a colour, `h w`."""
    return (picture - rgb.view(3, 1, 1)).abs().amax(dim=0) < 0.25


def test_an_example_holds_what_the_files_hold(tmp_path: Path):
    data = Triplets(config(write_triplets(tmp_path)))
    assert len(data) == 3 and not data.broken
    made = data[1]
    assert (made.key, made.caption, made.subject) == ("b", "a red car, number b", "car")
    assert made.video.shape == (3, 3, 40, 40) and made.mask_frames == 1
    assert near(made.video[0], RED)[made.mask[0]].float().mean() > 0.7
    assert not near(made.video[0], RED)[~made.mask[0]].any()
    assert not made.mask[1:].any()
    assert near(made.image, RED).float().mean() > 0.85  # the box is square, so the prompt is all subject
    # Frames 0, 4, 8 of 12: the ground brightens by 4/11 of 0.8 from one to the next.
    greens = made.video[:, 1, 2, 2]
    assert greens.diff().tolist() == pytest.approx([0.29, 0.29], abs=0.04)


def test_the_examples_come_in_the_order_of_the_files(tmp_path: Path):
    root = write_triplets(tmp_path, ("z", "m", "a"))
    assert [Triplets(config(root))[i].key for i in range(3)] == ["z", "m", "a"]
    (root / "birds.csv").write_text("videoid,page_dir,name\nm,web,a car that is no bird\n")
    (root / "cars.csv").write_text("videoid,page_dir,name\nz,web,one car\n")
    assert [item.row.key for item in Triplets(config(root)).items] == ["m", "z"]
    assert [item.row.key for item in Triplets(config(root, csv="cars.csv")).items] == ["z"]


def test_training_varies_by_epoch_and_evaluation_does_not(tmp_path: Path):
    data = Triplets(config(write_triplets(tmp_path), augment=Augment(degrees=30), seed=4))
    again = Triplets(config(tmp_path, augment=Augment(degrees=30), seed=4))
    assert torch.equal(data.at(1, 7).image, again.at(1, 7).image)
    assert not torch.equal(data.at(1, 7).image, data.at(1, 8).image)
    assert not torch.equal(data.at(1, 7).image, data[1].image)
    assert torch.equal(data.at(1, 7).video, data[1].video)
    loader = Loader(data, batch_size=3)
    assert not torch.equal(loader.batch(0).image, loader.batch(1).image)


def test_a_run_varies_the_image_prompt_as_videobooth_does_or_not_at_all(tmp_path: Path):
    root = str(write_triplets(tmp_path, ("a",)))
    asks = {"kind": "triplets", "frames": 3, "size": 40}
    varied = DataConfig(**asks, triplets=TripletsOptions(root=root)).build().config.augment
    assert (varied.flip, varied.degrees) == (True, 30.0) and varied.trim > 0
    for still in (
        DataConfig(**asks, triplets=TripletsOptions(root=root, augment=False)).build(),
        DataConfig(**asks, triplets=TripletsOptions(root=root)).build("dev"),
    ):
        assert torch.equal(still.at(0, 1).image, still[0].image)


def test_a_varied_stride_keeps_frame_0(tmp_path: Path):
    data = Triplets(config(write_triplets(tmp_path), vary_stride=True))
    clips = [data.at(0, epoch) for epoch in range(12)]
    assert all(torch.equal(made.video[0], data[0].video[0]) for made in clips)
    steps = {round(float(made.video[:, 1, 2, 2].diff()[0]), 1) for made in clips}
    assert len(steps) >= 3  # of the strides 1 to 4


@pytest.mark.parametrize("x", [0, 20, 44])
def test_the_crop_moves_to_keep_the_subject(tmp_path: Path, x):
    made = Triplets(config(write_triplets(tmp_path, ("a",), x=x)))[0]
    assert made.mask[0].sum() == 16 * 16
    assert near(made.video[0], RED)[made.mask[0]].float().mean() > 0.7


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fit_gives_the_size_and_the_mask_follows_the_picture(data):
    height, width = data.draw(st.integers(16, 48)), data.draw(st.integers(16, 48))
    size = data.draw(st.integers(8, 40)), data.draw(st.integers(8, 40))
    x0, y0 = data.draw(st.integers(0, width - 9)), data.draw(st.integers(0, height - 9))
    mask = np.zeros((height, width), bool)
    mask[y0 : y0 + 8, x0 : x0 + 8] = True
    pictures = torch.from_numpy(np.where(mask[..., None], np.uint8(255), np.uint8(0)))[None].repeat(
        2, 1, 1, 3
    )
    video, small = fit(pictures, mask, box=(x0, y0, x0 + 8, y0 + 8), size=size)
    assert video.shape == (2, 3, *size) and small.shape == size
    assert video.min() >= -1 and video.max() <= 1
    assert small.any()
    clear = video[0, 0].abs() > 0.5  # on the rim, rounding decides
    assert ((video[0, 0] > 0) == small)[clear].all()
    scale = max(size[0] / height, size[1] / width)
    if 8 * scale <= min(size) - 2:  # it fits, so all of it is there
        # A side of s pixels covers s - 1 to s + 1 of the grid, wherever it lies.
        assert (8 * scale - 1) ** 2 <= small.sum() <= (8 * scale + 1) ** 2


def test_broken_examples_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = write_triplets(tmp_path, ("a", "b", "c", "d"))
    path = root / "videos" / "web" / "b.mp4"
    path.write_bytes(path.read_bytes()[:-300])
    (root / "masks" / "d" / "mask.json").unlink()
    with caplog.at_level(logging.WARNING):
        data = Triplets(config(root, max_broken=2))
    assert [item.row.key for item in data.items] == ["a", "c"]
    assert set(data.broken) == {"b", "d"} and "truncated" in data.broken["b"]
    (record,) = caplog.records
    assert "2 of 4 examples" in record.getMessage() and "b.mp4" in record.getMessage()
    with pytest.raises(
        ValueError, match=r"2 of 4 examples.*data.triplets.max_broken is 1.*\n  b: .*truncated"
    ) as caught:
        Triplets(config(root, max_broken=1))
    assert "mask.json" in str(caught.value)


def test_the_subject_is_the_best_label_that_the_caption_has(tmp_path: Path):
    root = write_triplets(tmp_path, ("a",))
    path = root / "masks" / "a" / "mask.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([*entries, {**entries[1], "value": 2, "label": "tree", "logit": 0.99}]))
    assert Triplets(config(root))[0].subject == "car"


@pytest.mark.parametrize("subject", ["heart", "tar", "red spinning", ""])
def test_a_caption_without_the_subjects_whole_words_is_refused(subject):
    with pytest.raises(ValueError, match=rf"'a red star is spinning'.*'{subject}' as whole words"):
        check_caption("a red star is spinning", subject)


def test_the_subject_may_be_several_words_in_any_case():
    check_caption("My Polar  Bear, asleep.", "polar bear")


def test_what_a_caption_must_have_of_its_subject_is_a_parameter(tmp_path: Path):
    """As the released VideoBooth finds it: "two polar bears" has the first token of "polar bear"."""
    root = write_triplets(tmp_path, ("a", "b"))
    for name, label in (("a", "polar bear"), ("b", "hot dog")):
        path = root / "masks" / name / "mask.json"
        path.write_text(path.read_text().replace('"car"', f'"{label}"'))
    (root / "cars.csv").write_text("videoid,page_dir,name\na,web,two polar bears\nb,web,a cold night\n")
    with pytest.raises(
        ValueError, match=r"2 of 2 examples.*\n  a: .*'two polar bears'.*'polar bear' as whole"
    ):
        Triplets(config(root))
    check = partial(check_subject, first_token_suffices=True)
    data = Triplets(config(root, max_broken=1), check)
    assert (data[0].caption, data[0].subject) == ("two polar bears", "polar bear")
    assert set(data.broken) == {"b"}
    for words in ("not even the first token 'hot'", "'hot dog'", "'a cold night'", "correct mask.json"):
        assert words in data.broken["b"]


@pytest.mark.parametrize("size", [(24, 40), (40, 24)])
def test_a_size_may_be_oblong(tmp_path: Path, size):
    made = Triplets(config(write_triplets(tmp_path, ("a",)), size=size))[0]
    assert made.video.shape[2:] == size and made.image.shape == (3, 24, 24)


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared data is not on this machine")
def test_the_real_clips_load():
    data = Triplets(TripletsConfig(root=str(REAL), frames=16, stride=4, size=64))
    assert [data[i].subject for i in range(len(data))] == ["car", "man", "man", "rabbit"]
    for made in (data[i] for i in range(len(data))):
        assert 0.01 < made.mask[0].float().mean() < 0.6
        subject = rearrange(made.video[0], "c h w -> h w c")[made.mask[0]].mean(0)
        ink = rearrange(made.image, "c h w -> h w c")[(made.image < 0.9).any(dim=0)].mean(0)
        assert (subject - ink).abs().max() < 0.25  # the prompt has the colours of the masked pixels
