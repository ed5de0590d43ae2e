"""Similarity to the image prompt: arithmetic, crops, and a real network on photographs."""

from itertools import pairwise

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from skimage.transform import AffineTransform, warp

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned.crops import (
    crop_subjects,
    crop_to_subject,
    find_on_smooth,
    find_on_white,
    masks_of_boxes,
)
from dit_booth.evaluation.learned.networks import load_lite0
from dit_booth.evaluation.learned.similarity import features_of, similarity_scorer

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def statistics(pictures: torch.Tensor) -> torch.Tensor:
    """Features that differ for every picture: mean and standard deviation of each channel."""
    return torch.cat((pictures.mean(dim=(2, 3)), pictures.std(dim=(2, 3))), dim=1)


def naive_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [sum(float(x) ** 2 for x in v) ** 0.5 for v in (a, b)]
    return dot / (lengths[0] * lengths[1])


def everything(frames: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(frames), *frames.shape[-2:], dtype=torch.bool)


def test_scores_are_cosines_frame_by_frame():
    case = Case(video=random(4, 3, 16, 20), image=random(3, 12, 12, seed=1), caption="a cat")
    words = random(1, 6, seed=2)
    score = similarity_scorer("clip", statistics, lambda sentences: words[: len(sentences)], everything)
    scores = score(case)
    frames = [statistics(frame[None])[0] for frame in case.video]
    prompt = statistics(case.image[None])[0]
    assert scores["clip_i"] == pytest.approx([naive_cosine(f, prompt) for f in frames])
    assert scores["clip_t"] == pytest.approx([naive_cosine(f, words[0]) for f in frames])
    assert np.isnan(scores["clip_consistency"][0])
    pairs = pairwise(frames)
    assert scores["clip_consistency"][1:] == pytest.approx([naive_cosine(a, b) for a, b in pairs])
    assert set(scores) == {"clip_i", "clip_i_crop", "clip_consistency", "clip_t"}


def test_one_frame_has_no_consistency():
    scores = similarity_scorer("dino", statistics)(
        Case(video=random(1, 3, 16, 16), image=random(3, 8, 8), caption="")
    )
    assert [len(value) for value in scores.values()] == [1, 1, 1]
    assert np.isnan(scores["dino_consistency"]).all()


def test_wrong_features_are_refused():
    case = Case(video=random(2, 3, 8, 8), image=random(3, 8, 8), caption="")
    with pytest.raises(ValueError, match=r"dino returned features of shape \(2, 3, 8, 8\)"):
        similarity_scorer("dino", lambda x: x)(case)
    with pytest.raises(ValueError, match="dino returned NaN"):
        similarity_scorer("dino", lambda x: statistics(x) * float("nan"))(case)
    with pytest.raises(ValueError, match="images have 6 channels and text 4"):
        similarity_scorer("clip", statistics, lambda s: torch.ones(len(s), 4))(case)
    with pytest.raises(ValueError, match=r"masks are torch.float32 of shape \(2, 4\).*\(2, 8, 8\)"):
        similarity_scorer("dino", statistics, find=lambda x: torch.ones(2, 4))(case)


def test_pictures_of_several_sizes_keep_their_order():
    pictures = [random(3, 4 + i % 2, 6, seed=i) for i in range(5)]
    rows = features_of("x", statistics, pictures)
    for picture, row in zip(pictures, rows, strict=True):
        assert torch.allclose(row, F.normalize(statistics(picture[None])[0].double(), dim=0))


def test_a_crop_is_the_subject_on_a_white_square():
    picture, mask = random(3, 10, 12), torch.zeros(10, 12, dtype=torch.bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    crop = crop_to_subject(picture, mask)
    assert crop.shape == (3, 6, 6)
    inside = picture[:, 2:5, 3:9].clone()
    inside[:, 0, 0] = 1
    assert torch.equal(crop[:, 1:4], inside)
    assert bool((crop[:, 0] == 1).all()) and bool((crop[:, 4:] == 1).all())
    assert crop_to_subject(picture, torch.zeros_like(mask)) is picture


def test_boxes_are_rectangular_masks():
    masks = masks_of_boxes(torch.tensor([[1.0, 2.0, 4.0, 3.0], [0.0, 0.0, 6.0, 5.0]]), height=5, width=6)
    assert masks[1].all()
    assert masks[0].sum() == 3
    assert masks[0, 2, 1:4].all()


def test_the_toy_worlds_subject_is_found_and_fills_its_crop():
    example = Toyworld(ToyworldConfig(size=48, frames=4))[1]
    found = find_on_smooth(example.video)
    overlap = (found & example.mask).sum((1, 2)) / (found | example.mask).sum((1, 2))
    assert overlap.min() > 0.8
    for crop, mask in zip(crop_subjects(example.video, find_on_smooth), found, strict=True):
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert crop.shape[-1] == max(rows, columns) < 48
    large = F.interpolate(example.video, scale_factor=8)  # segmented at 128 pixels
    agreement = (find_on_smooth(large)[:, 4::8, 4::8] == found).float().mean()
    assert agreement > 0.97
    assert find_on_white(example.image[None]).any()
    assert not find_on_white(torch.ones(1, 3, 8, 8)).any()


@pytest.fixture(scope="module")
def photographs() -> dict[str, torch.Tensor]:
    names = ("chelsea", "coffee", "astronaut", "rocket")
    pixels = {name: torch.from_numpy(getattr(skimage.data, name)()) for name in names}
    return {name: x.permute(2, 0, 1).float() / 127.5 - 1 for name, x in pixels.items()}


@pytest.fixture(scope="module")
def lite0():
    return load_lite0({})


def views(picture: torch.Tensor) -> torch.Tensor:
    """Three views of a photograph at 160 x 160: a crop, one that is turned and darker, and a mirrored one."""
    height, width = picture.shape[-2:]
    side = int(0.85 * min(height, width))
    pixels = picture.permute(1, 2, 0).numpy()
    turn = AffineTransform(rotation=0.15, translation=(20, -10), scale=0.9)
    turned = torch.from_numpy(warp(pixels, turn.inverse, mode="edge", preserve_range=True)).permute(2, 0, 1)
    corners = [
        picture[:, :side, :side],
        (turned.float() * 0.8)[:, -side:, -side:],
        picture.flip(2)[:, :side, -side:],
    ]
    return torch.cat([F.interpolate(x[None], (160, 160), mode="area") for x in corners]).clamp(-1, 1)


def test_views_of_one_photograph_are_more_alike_than_photographs(photographs, lite0):
    features = {name: F.normalize(lite0(views(x)), dim=1) for name, x in photographs.items()}
    same = [float((f @ f.T)[np.triu_indices(3, 1)].min()) for f in features.values()]
    other = [float((a @ b.T).max()) for m, a in features.items() for n, b in features.items() if m < n]
    assert min(same) > max(other)


def test_crops_see_the_subject_and_not_its_ground(photographs, lite0):
    """Parts of photographs on plain grounds, the image prompt's on white: a subject's crops have no ground left."""
    score = similarity_scorer("lite0", lite0)
    blue, pink = (-0.2, 0.6, 0.9), (0.9, 0.2, 0.8)
    for name, other in (
        ("chelsea", "coffee"),
        ("coffee", "chelsea"),
        ("astronaut", "rocket"),
        ("rocket", "astronaut"),
    ):
        own = [on_ground(photographs[name], blue, 10), on_ground(photographs[name], pink, 70)]
        wrong = [on_ground(photographs[other], blue, 10), on_ground(photographs[other], pink, 70)]
        prompt = on_ground(photographs[name], (1.0, 1.0, 1.0), 40)
        scores = score(Case(video=torch.stack(own + wrong), image=prompt, caption=""))
        crop, whole = scores["lite0_i_crop"], scores["lite0_i"]
        assert min(whole[:2]) > max(whole[2:]) + 0.3
        assert min(crop[:2]) > max(crop[2:]) + 0.5
        assert (crop[:2] > whole[:2]).all() and (crop[2:] < whole[2:]).all()


def on_ground(photograph: torch.Tensor, colour: tuple[float, float, float], corner: int) -> torch.Tensor:
    """A part of a photograph, 80 x 80, on a plain ground of 160 x 160."""
    picture = torch.tensor(colour)[:, None, None].repeat(1, 160, 160)
    part = F.interpolate(photograph[None, :, 40:240, 150:350], (80, 80), mode="area")[0]
    picture[:, corner : corner + 80, corner : corner + 80] = part
    return picture
