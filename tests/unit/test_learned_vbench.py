"""VBench's formulas and NexusScore against loops written from their definitions."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned.crop_and_match import crop_and_match_scorer, nexus_score
from dit_booth.evaluation.learned.vbench import (
    background_scorer,
    consistency,
    i2v_subject,
    score_flickering,
    subject_scorer,
    temporal_flickering,
)

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / float(a.norm() * b.norm())


@pytest.mark.parametrize("seed", range(4))
def test_consistency_clamps_each_cosine(seed):
    features = random(7, 4, seed=seed).double()  # some cosines are negative
    total = 0.0
    for i in range(1, 7):
        total += max(0.0, cosine(features[i - 1], features[i])) + max(0.0, cosine(features[0], features[i]))
    assert consistency(F.normalize(features, dim=1)) == pytest.approx(total / 2 / 6)


@pytest.mark.parametrize("seed", range(4))
def test_i2v_subject_weighs_three_terms(seed):
    features, reference = random(5, 4, seed=seed).double(), random(1, 4, seed=9).double()
    to_reference = [max(0.0, cosine(f, reference[0])) for f in features]
    pairs = [max(0.0, cosine(features[i - 1], features[i])) for i in range(1, 5)]
    expected = 0.4 * max(to_reference) + 0.3 * sum(pairs) / 4 + 0.3 * min(pairs)
    ours = i2v_subject(F.normalize(features, dim=1), F.normalize(reference, dim=1))
    assert ours == pytest.approx(expected)


def test_flickering_is_of_8_bit_frames():
    video = random(4, 3, 6, 5)
    frames = [np.round((frame.numpy() + 1) * 127.5).astype(np.uint8) for frame in video]
    steps = [np.abs(a.astype(float) - b.astype(float)).mean() for a, b in pairwise(frames)]
    assert temporal_flickering(video) == pytest.approx((255 - np.mean(steps)) / 255)
    assert temporal_flickering(video[:1].expand(3, -1, -1, -1)) == 1
    assert temporal_flickering(torch.stack((video[0] * 0 - 1, video[0] * 0 + 1))) == 0


def test_scorers_give_one_value_for_the_video():
    case = Case(video=random(3, 3, 8, 8), image=random(3, 8, 8, seed=1), caption="")
    features = F.normalize(case.video.flatten(1).double(), dim=1)
    reference = F.normalize(case.image[None].flatten(1).double(), dim=1)
    assert subject_scorer(lambda x: x.flatten(1))(case) == {
        "vbench_subject": pytest.approx(consistency(features)),
        "vbench_i2v_subject": pytest.approx(i2v_subject(features, reference)),
    }
    assert background_scorer(lambda x: x.flatten(1))(case)["vbench_background"] > 0
    single = Case(video=case.video[:1], image=case.image, caption="")
    for score in (
        subject_scorer(lambda x: x.flatten(1)),
        background_scorer(lambda x: x.flatten(1)),
        score_flickering,
    ):
        assert all(math.isnan(value) for value in score(single).values())


def test_nexus_divides_twice_as_released():
    confidence = np.array([0.9, 0.61, 0.6, 0.7, 0.95])  # the third does not exceed 0.6
    text = np.array([0.5, 0.31, 0.9, 0.30, 0.4])  # the fourth does not exceed 0.30
    image = np.array([0.8, 0.6, 0.1, 0.2, 0.4])
    nexus = nexus_score(confidence, text, image, detected=3)
    assert nexus.corrected == pytest.approx((0.8 + 0.6 + 0.4) / 3)
    assert nexus.released == pytest.approx((0.8 + 0.6 + 0.4) / 3 / 3)
    assert nexus_score(confidence * 0.5, text, image, detected=3) == (0, 0)
    assert nexus_score(*(np.empty(0),) * 3, detected=0) == (0, 0)
    with pytest.raises(ValueError, match="5 confidences, 4 text and 5 image"):
        nexus_score(confidence, text[:4], image, detected=3)


RED, GREEN = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, 1.0, -1.0])


def planted() -> Case:
    """Forty green frames with a red square of 4 x 6 that moves; in every fifth frame it is green: not there."""
    video = GREEN[:, None, None].repeat(40, 1, 16, 16)
    for i in range(40):
        if i % 5:
            video[i, :, 2:6, i % 9 : i % 9 + 6] = RED[:, None, None]
    return Case(video=video, image=RED[:, None, None].expand(3, 8, 8), caption="a red car", subject="red")


def find_red(frames: torch.Tensor, reference: torch.Tensor) -> list[torch.Tensor]:
    """Boxes of red pixels with confidence 0.9, and a spurious one that is not confident."""
    boxes = []
    for frame in frames:
        rows, columns = (frame[0] > 0).nonzero(as_tuple=True)
        found = [torch.tensor([12.0, 12.0, 15.0, 15.0, 0.55])]
        if len(rows):
            edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            found.append(torch.tensor([*map(float, edges), 0.9]))
        boxes.append(torch.stack(found))
    return boxes


def mean_colour(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.mean(dim=(2, 3)) + 1


def colour_words(sentences) -> torch.Tensor:
    return torch.stack([(RED if "red" in sentence else GREEN) + 1 for sentence in sentences])


def test_crop_and_match_finds_the_planted_subject():
    scores = crop_and_match_scorer(find_red, mean_colour, colour_words)(planted())
    sampled = np.linspace(0, 39, 32, dtype=int).tolist()
    present = [i for i in sampled if i % 5]
    for i in range(40):
        if i not in sampled:
            assert np.isnan(scores["match_found"][i]) and np.isnan(scores["match_i"][i])
        else:
            assert scores["match_found"][i] == float(i % 5 > 0)
            assert scores["match_i"][i] == pytest.approx(1) if i % 5 else np.isnan(scores["match_i"][i])
    assert len(present) < 32
    assert scores["nexus"] == pytest.approx(1)
    assert scores["nexus_released"] == pytest.approx(
        1 / 32
    )  # every frame has a box above the detector's own limit


def test_crop_and_match_repeats_the_frames_of_short_videos():
    case = planted()
    short = Case(video=case.video[4:7], image=case.image, caption=case.caption)  # the caption names it
    scores = crop_and_match_scorer(find_red, mean_colour, colour_words)(short)
    assert scores["match_found"].tolist() == [1, 0, 1]
    nothing = crop_and_match_scorer(lambda f, r: [torch.empty(0, 5)] * len(f), mean_colour, colour_words)(
        short
    )
    assert nothing["nexus"] == nothing["nexus_released"] == 0
    assert np.isnan(nothing["match_i"]).all()


def test_a_detector_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"shape \[\(1, 4\)\]\.\.\. for 1 frames.*each of the 32 frames"):
        crop_and_match_scorer(lambda f, r: [torch.zeros(1, 4)], mean_colour, colour_words)(planted())
