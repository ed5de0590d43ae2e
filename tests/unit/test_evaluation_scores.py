"""CLIP scores, pixel metrics, and the table of all of them."""

import math

import pytest
import torch
from einops import reduce, repeat
from torch import Tensor

from dit_booth.data.toyworld.world import Toyworld, ToyworldConfig
from dit_booth.evaluation import evaluate, summary
from dit_booth.evaluation.learned.clip_score import clip_scores
from dit_booth.evaluation.pixels import motion, psnr

torch.set_num_threads(1)


def mean_colour(pictures: Tensor) -> Tensor:
    return reduce(pictures, "n c h w -> n c", "mean")


def words(sentences) -> Tensor:
    return torch.tensor([[1.0, 0.0, 0.0] if "red" in sentence else [0.0, 1.0, 0.0] for sentence in sentences])


def solid(*colours: tuple[float, float, float], size: int = 8) -> Tensor:
    return repeat(torch.tensor(colours), "f c -> f c h w", h=size, w=size)


RED, GREEN = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)


def test_clip_scores_average_over_all_frames():
    video = solid(RED, RED, GREEN, GREEN)
    scores = clip_scores(
        [video, solid(RED, RED)], [solid(RED)[0]] * 2, ["a red ball", "a ball"], mean_colour, words
    )
    assert scores["clip_i"] == pytest.approx([0.5, 1])
    assert scores["clip_t"] == pytest.approx([0.5, 0])
    assert scores["clip_consistency"] == pytest.approx([2 / 3, 1])


def test_identical_images_score_one():
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    video = repeat(image, "c h w -> f c h w", f=3)
    scores = clip_scores([video], [image], ["red"], lambda x: 5 * x.flatten(1), lambda _: torch.ones(1, 192))
    assert scores["clip_i"] == pytest.approx([1])
    assert scores["clip_consistency"] == pytest.approx([1])


def test_clip_scores_refuse_what_does_not_fit():
    video, image = solid(RED, GREEN), solid(RED)[0]
    with pytest.raises(ValueError, match="1 videos, 2 images and 1 captions"):
        clip_scores([video], [image, image], ["red"], mean_colour, words)
    with pytest.raises(ValueError, match=r"clip_t have 3 and 4 channels.*one model"):
        clip_scores([video], [image], ["red"], mean_colour, lambda _: torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"image_features returned shape \(2, 3, 8, 8\)"):
        clip_scores([video], [image], ["red"], lambda x: x, words)


def test_psnr_in_decibels():
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(20, abs=1e-4)  # peak 2, error 0.2
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, a[:1])


def test_motion_is_a_share_of_the_range():
    still = solid(RED, RED, RED)
    assert motion(still) == 0
    assert motion(solid((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0))) == 1
    assert motion(solid((0.0, 0.0, 0.0), (0.2, 0.2, 0.2), (0.2, 0.2, 0.2))) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="at least 2"):
        motion(still[:1])


def test_evaluate_and_its_summary():
    world = Toyworld(ToyworldConfig(size=32, frames=3))
    examples = [world[i] for i in range(3)]
    truths, images, captions = zip(*((e.video, e.image, e.caption) for e in examples), strict=True)
    videos = [truth.clone() for truth in truths]
    videos[2] = repeat(truths[2][0], "c h w -> f c h w", f=3)  # frozen
    shapes = ["circle" if examples[0].subject != "circle" else "star", *(e.subject for e in examples[1:])]
    rows = evaluate(
        videos, truths, images, captions, shapes=shapes, image_features=mean_colour, text_features=words
    )
    assert rows[0]["shape"] < 0.8 < rows[1]["shape"]
    assert rows[0]["palette"] == rows[0]["truth_palette"] < 6
    assert rows[0]["psnr"] == math.inf
    assert rows[2]["motion"] == 0 < rows[2]["truth_motion"]
    assert rows[2]["clip_consistency"] == pytest.approx(1)
    assert set(rows[0]) == {
        *("palette", "subject_found", "motion", "psnr", "truth_palette", "truth_motion"),
        "shape",
        *("clip_i", "clip_t", "clip_consistency"),
    }
    table = summary(rows)
    assert table["subject_found"].mean == 1
    assert table["subject_found"].n == 3
    assert table["motion"].mean == pytest.approx(sum(row["motion"] for row in rows) / 3)


def test_summary_gives_mean_standard_error_and_count():
    table = summary([{"a": 1.0, "b": 5.0}, {"a": 3.0}, {"a": 5.0}])
    assert (table["a"].mean, table["a"].n) == (3, 3)
    assert table["a"].stderr == pytest.approx(2 / math.sqrt(3))
    assert (table["b"].mean, table["b"].n) == (5, 1)
    assert math.isnan(table["b"].stderr)
    with pytest.raises(ValueError, match="rows is empty"):
        summary([])


def test_evaluate_without_truths_networks_or_motion():
    example = Toyworld(ToyworldConfig(size=32, frames=1))[0]
    (row,) = evaluate(example.video[None], None, example.image[None], [example.caption])
    assert set(row) == {"palette", "subject_found"}
    (row,) = evaluate(
        [example.video], None, [example.image], ["red"], image_features=mean_colour, text_features=words
    )
    assert set(row) == {"palette", "subject_found", "clip_i", "clip_t"}


def test_evaluate_refuses_lists_that_do_not_match():
    example = Toyworld(ToyworldConfig(size=32, frames=1))[0]
    with pytest.raises(ValueError, match="'truths': 0"):
        evaluate([example.video], [], [example.image], ["red"])
    with pytest.raises(ValueError, match="'shapes': 2"):
        evaluate([example.video], None, [example.image], ["red"], shapes=["star", "star"])
    with pytest.raises(ValueError, match="come together"):
        evaluate([example.video], None, [example.image], ["red"], image_features=mean_colour)
