"""One subject as data, its settings, its stage's address, and class images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import repeat
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import RunConfig, SubjectConfig
from dit_booth.data.subject import SubjectData, as_frame, caption_of, insert_before, vary
from dit_booth.data.video import read_video, write_video
from dit_booth.sampling import prior
from dit_booth.testing.tiny import trial
from dit_booth.training.address import stages_of
from dit_booth.training.distributed import Ranks

SIZE = 12


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., str]:
    """picture(name, value): an image file with a square of one grey value on white."""

    def write(name: str = "star.png", value: int = 40) -> str:
        pixels = np.full((24, 24, 3), 255, np.uint8)
        pixels[6:18, 6:18] = value
        Image.fromarray(pixels).save(tmp_path / name)
        return str(tmp_path / name)

    return write


def build(subject: SubjectConfig, **changes: object) -> SubjectData:
    given = {"frames": 3, "size": (SIZE, SIZE), "side": SIZE, "seed": 0, "prior": None, **changes}
    return subject.build(**given)  # type: ignore[arg-type]


# ---- captions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "word", "caption"),
    [
        ("{} is resting", "star", "a star is resting"),
        ("a photo of {}", "owl", "a photo of an owl"),
        ("a photo of {}", "Egyptian cat", "a photo of an Egyptian cat"),
    ],
)
def test_a_caption_has_the_words_with_their_article(template: str, word: str, caption: str):
    assert caption_of(template, word) == caption


@pytest.mark.parametrize(
    ("caption", "subject", "expected"),
    [
        ("a star is on snow", "star", "a sks star is on snow"),
        ("a Star and the star", "star", "a sks Star and the sks star"),
        ("a starfish eats a star", "star", "a starfish eats a sks star"),
        ("an egyptian  cat runs", "Egyptian cat", "an sks egyptian  cat runs"),
        ("a dog runs", "star", "a dog runs"),
        ("a star is on snow", "", "a star is on snow"),
        ("a star is on snow", None, "a star is on snow"),
    ],
)
def test_the_rare_token_stands_before_every_whole_occurrence(caption: str, subject: str, expected: str):
    assert insert_before(caption, subject, "sks") == expected


def test_a_rare_token_is_taken_literally():
    assert insert_before("a star", "star", r"\1x") == r"a \1x star"


def test_the_rare_token_reaches_the_text_encoder_and_not_the_class_caption():
    components = trial("none").components
    token = replace(components, config=replace(components.config, subject=SubjectConfig(token="sks")))
    with_subject, class_only = (token.tokenize(["a red star"], [name]) for name in ("star", None))
    assert torch.equal(with_subject.ids, components.tokenize(["a red sks star"], ["star"]).ids)
    assert torch.equal(class_only.ids, components.tokenize(["a red star"], [None]).ids)
    assert int(with_subject.spans.sum()) == int(components.tokenize(["a red star"], ["star"]).spans.sum())


# ---- data --------------------------------------------------------------------------------------------------


def test_variation_stays_in_range_and_is_white_at_the_border():
    frames = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    every = torch.stack([vary(frames, np.random.default_rng(seed)) for seed in range(20)])
    assert every.abs().max() <= 1
    assert not torch.equal(every[0], every[1])
    dark = torch.stack([vary(-torch.ones(1, 3, 40, 40), np.random.default_rng(s)) for s in range(40)])
    assert (dark[..., 0] == 1).any(), "shrunk, rotated or shifted images show white at a side"
    assert (dark[..., 20, 20] == -1).all(), "and the subject stays in the middle"


def test_variation_turns_without_distortion(monkeypatch):
    """A disc stays a disc of the shrunk size, on frames of any aspect; only the shift moves its centre."""
    monkeypatch.setattr("dit_booth.data.subject.SHRINK", 0.999999)
    y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(64) - 31.5, indexing="ij")
    disc = torch.where((x**2 + y**2 < 14**2), -1.0, 1.0).expand(1, 3, 48, 64)
    for seed in range(10):
        dark = (1 - vary(disc, np.random.default_rng(seed))[0, 0]) / 2
        rows, columns = dark.sum(1).max(), dark.sum(0).max()
        assert float(dark.sum()) == pytest.approx(np.pi * 14**2, rel=0.03)
        assert float(rows) == pytest.approx(28, abs=1.5) and float(columns) == pytest.approx(28, abs=1.5)
        centre = [float((dark * axis).sum() / dark.sum()) for axis in (x, y)]
        assert abs(centre[0]) <= 0.1 * 64 + 0.5 and abs(centre[1]) <= 0.1 * 48 + 0.5


def test_an_image_is_one_frame_centered_on_white():
    frame = as_frame(-torch.ones(3, 8, 8), 8, 16)
    assert frame.shape == (1, 3, 8, 16)
    assert (frame[..., 4:12] == -1).all()
    assert (frame[..., :4] == 1).all() and (frame[..., 12:] == 1).all()


def test_examples_are_pure_and_vary(picture):
    data = build(SubjectConfig(image=picture(), word="star", captions=("one {}", "two {}")))
    assert torch.equal(data.at(3, 1).video, data.at(3, 1).video)
    assert not torch.equal(data.at(3, 1).video, data.at(3, 2).video)
    assert {data[i].caption for i in range(16)} == {"one a star", "two a star"}
    still = build(SubjectConfig(image=picture(), word="star", augment=False))
    assert torch.equal(still.at(0, 0).video, still.at(5, 0).video)


def test_class_images_come_in_their_share_with_their_own_captions(picture):
    subject = SubjectConfig(
        image=picture(), word="star", captions=("one {}", "two {}"), prior=4, prior_weight=3.0
    )
    images = torch.linspace(-1, 0.5, 4).reshape(4, 1, 1, 1, 1).expand(4, 1, 3, SIZE, SIZE)
    data = build(subject, prior=images)
    examples = [data[i] for i in range(400)]
    of_class = [e for e in examples if not e.subject]
    assert len(of_class) / len(examples) == pytest.approx(3 / 4, abs=0.06)  # 3 sigma
    for example in of_class:
        number = next(i for i in range(4) if torch.equal(example.video, images[i]))
        assert example.caption == ("one a star", "two a star")[number % 2]
        assert not example.image.any(), "the base has no image"


def test_a_video_is_read_whole_and_not_varied(picture, tmp_path):
    video = torch.rand(4, 3, SIZE, SIZE) * 2 - 1
    write_video(tmp_path / "v.mp4", video, fps=8, lossless=True)
    data = build(SubjectConfig(image=picture(), word="star", video=str(tmp_path / "v.mp4"), tune_on="video"))
    assert data[0].video.shape == (3, 3, SIZE, SIZE)
    assert (data[0].video - video[:3]).abs().max() <= 1 / 127.5
    assert torch.equal(data[0].video, data[9].video)
    given = {"image": picture(), "word": "star", "tune_on": "video"}
    wide = torch.cat([video.new_ones(4, 3, SIZE, 2), video, -video.new_ones(4, 3, SIZE, 4)], dim=-1)
    write_video(tmp_path / "wide.mp4", wide, fps=8, lossless=True)
    middle = build(SubjectConfig(video=str(tmp_path / "wide.mp4"), **given))[0].video
    assert (middle - wide[:3, ..., 3 : 3 + SIZE]).abs().max() <= 1 / 127.5, "its middle"
    large = repeat(video, "f c h w -> f c (h 2) (w 2)")
    write_video(tmp_path / "large.mp4", large, fps=8, lossless=True)
    small = build(SubjectConfig(video=str(tmp_path / "large.mp4"), **given))[0].video
    assert torch.nn.functional.mse_loss(small, video[:3]) < 0.1 * video.var(), "scaled down"


@pytest.mark.parametrize("side", [12, 15])
def test_lossless_video_is_lossless(tmp_path, side: int):
    video = torch.rand(3, 3, side, side + 1) * 2 - 1
    write_video(tmp_path / "v.mp4", video, fps=8, lossless=True)
    pixels = ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(read_video(tmp_path / "v.mp4"), pixels)


# ---- bad input ---------------------------------------------------------------------------------------------


def test_bad_settings_are_one_clear_error_each(picture):
    with pytest.raises(ValueError, match=r"subject\.captions has 'a photo'; write \{\} once"):
        SubjectConfig(captions=("a photo",))
    with pytest.raises(ValueError, match=r"subject\.prompts has '\{\} and \{\}'"):
        SubjectConfig(prompts=("{} and {}",))
    with pytest.raises(ValueError, match=r"subject\.captions is empty"):
        SubjectConfig(captions=())
    with pytest.raises(ValueError, match=r"subject\.prior is -1"):
        SubjectConfig(prior=-1)
    with pytest.raises(ValueError, match=r"subject\.prior_weight is nan"):
        SubjectConfig(prior_weight=float("nan"))
    with pytest.raises(ValueError, match=r"subject\.prior is 4, and subject\.tune_on is video"):
        SubjectConfig(video="v.mp4", prior=4, tune_on="video")
    with pytest.raises(ValueError, match=r"subject\.video is 'v\.mp4', and subject\.tune_on is image"):
        SubjectConfig(video="v.mp4")


def test_bad_images_are_one_clear_error_each(picture, tmp_path):
    with pytest.raises(ValueError, match=r"subject\.image .*white.png is all white"):
        build(SubjectConfig(image=picture("white.png", 255), word="star"))
    with pytest.raises(ValueError, match=r"subject\.image is empty"):
        build(SubjectConfig(word="star"))
    with pytest.raises(ValueError, match=r"subject\.word is empty"):
        build(SubjectConfig(image=picture()))
    with pytest.raises(ValueError, match=r"nothing\.png"):
        build(SubjectConfig(image=str(tmp_path / "nothing.png"), word="star"))


def test_bad_videos_are_one_clear_error_each(picture, tmp_path):
    write_video(tmp_path / "short.mp4", torch.zeros(2, 3, SIZE, SIZE), fps=8)
    given = {"image": picture(), "word": "star", "tune_on": "video"}
    with pytest.raises(ValueError, match=r"subject\.video is empty, and subject\.tune_on is video"):
        build(SubjectConfig(**given))
    with pytest.raises(ValueError, match=r"subject\.video .*short\.mp4 has 2 frames and data\.frames is 3"):
        build(SubjectConfig(video=str(tmp_path / "short.mp4"), **given))
    with pytest.raises(ValueError, match=r"subject\.video: .*none\.mp4"):
        build(SubjectConfig(video=str(tmp_path / "none.mp4"), **given))


# ---- addresses ---------------------------------------------------------------------------------------------


def config(**subject: object) -> RunConfig:
    return RunConfig.create(
        "demo",
        strategy="token_replacement+lora",
        schedule=["coarse", "subject"],
        subject=subject,
    )


def addresses(**subject: object) -> tuple[str, str]:
    coarse, own = stages_of(config(**subject))
    return coarse.address, own.address


def test_an_address_depends_on_the_subjects_content_and_not_on_its_path(picture):
    coarse, own = addresses(image=picture("a.png"), word="star")
    assert addresses(image=picture("b.png"), word="star") == (coarse, own)
    assert addresses(image=picture("b.png"), word="star", prompts=["{} runs"]) == (coarse, own)
    others = [
        addresses(image=picture("c.png", 41), word="star"),
        addresses(image=picture("a.png"), word="ring"),
        addresses(image=picture("a.png"), word="star", captions=["{} rests"]),
        addresses(image=picture("a.png"), word="star", augment=False),
        addresses(image=picture("a.png"), word="star", prior=4),
    ]
    assert {other for other, _ in others} == {coarse}
    assert len({own, *(other for _, other in others)}) == len(others) + 1


def test_class_images_depend_on_how_they_are_sampled(picture):
    given = {"image": picture(), "word": "star"}
    plain, with_prior = config(**given), config(**given, prior=4)
    slow = replace(plain.sampler, steps=7)
    assert stages_of(replace(plain, sampler=slow)) == stages_of(plain)
    assert stages_of(replace(with_prior, sampler=slow))[1].address != stages_of(with_prior)[1].address


def test_the_rare_token_is_in_every_stages_address(picture):
    given = {"image": picture(), "word": "star"}
    assert addresses(**given, token="sks")[0] != addresses(**given)[0]


# ---- what is trained ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_textual_inversion_trains_one_embedding(backbone: str):
    tested = trial("textual_inversion", backbone)
    parameters = tested.train_in("subject")
    assert [p.shape for p in parameters.values()] == [(1, tested.model.text.width)]
    tested(tested.reference()).square().mean().backward()
    grown = [name for name, p in tested.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert grown == list(parameters)


def test_textual_inversion_starts_as_the_class_word():
    tested = trial("textual_inversion")
    tested.prompt = tested.components.tokenize(["a dog runs", "the red cat"], ["dog", "cat"])
    assert torch.allclose(tested(tested.reference()), tested.plain(), atol=1e-5)


# ---- class images ------------------------------------------------------------------------------------------


class One(Ranks):
    """One rank without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def gather(self, mine: dict[int, str]) -> dict[int, str]:  # type: ignore[override]
        return dict(mine)


def with_prior(count: int, **settings: object) -> Components:
    components = trial("lora", "dit-factorised", **settings).components
    subject = SubjectConfig(word="star", token="sks", captions=("one {}", "two {}"), prior=count)
    sampler = replace(components.config.sampler, steps=2)
    return replace(components, config=replace(components.config, subject=subject, sampler=sampler))


def test_class_images_are_kept_and_the_missing_ones_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(prior, "CHUNK", 2)
    components = with_prior(5)
    first = prior.prior_images(components, tmp_path, One())
    assert first is not None and first.shape == (5, 1, 3, SIZE, SIZE)
    assert first.abs().max() <= 1
    assert not torch.equal(first[0], first[2]), "each has its own noise"
    files = sorted((tmp_path / prior.FOLDER).iterdir())
    assert [len(load_file(file)["images"]) for file in files] == [2, 2, 1]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    again = prior.prior_images(components, tmp_path, One())
    assert again is not None and torch.equal(again, first)
    now = [file.stat().st_mtime_ns for file in files]
    assert (now[0], now[2]) == (times[0], times[2]) and now[1] > times[1]


def test_class_images_are_those_of_the_base_for_the_class_word(tmp_path):
    """Neither strategies nor the rare token change them."""
    plain, other = with_prior(2), with_prior(2)
    other.model.active = ("lora",)
    with torch.no_grad():
        for p in other.model.strategy.parameters():
            p.add_(0.3)
    other = replace(other, config=replace(other.config, subject=replace(other.config.subject, token="xyz")))
    images: list[Tensor | None] = [
        prior.prior_images(c, tmp_path / str(i), One()) for i, c in enumerate((plain, other))
    ]
    assert images[0] is not None and images[1] is not None
    assert torch.equal(images[0], images[1])
    assert other.model.active == ("lora",), "and the strategies are active again"


def test_a_base_that_samples_nan_is_an_error_and_leaves_nothing(tmp_path):
    components = with_prior(2)
    with torch.no_grad():
        next(components.model.backbone.parameters()).fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"subject\.prior: the base samples values that are not finite for 'star'"
    ):
        prior.prior_images(components, tmp_path, One())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_no_prior_is_no_images(tmp_path):
    assert prior.prior_images(with_prior(0), tmp_path, One()) is None
