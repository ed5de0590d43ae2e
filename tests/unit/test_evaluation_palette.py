"""The palette distance says how far colours are, in Delta E 2000."""

import numpy as np
import pytest
import torch
from skimage.color import hsv2rgb, rgb2lab

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.evaluation.palette import Palette, palette, palette_distance, video_palette_distance

torch.set_num_threads(1)


def single(*lab: float) -> Palette:
    return Palette(np.array([lab]), np.ones(1))


def hue(value: float) -> torch.Tensor:
    return torch.tensor(hsv2rgb(np.array([[value, 0.7, 0.8]])))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [  # Sharma, Wu and Dalal, "The CIEDE2000 color-difference formula", 2005, table 1: pairs 1, 7, 17 and 25
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ],
)
def test_two_single_colours_are_their_cie2000_difference_apart(first, second, expected):
    assert palette_distance(single(*first), single(*second)) == pytest.approx(expected, abs=1e-4)


def test_transport_is_worked_out_by_hand():
    a = Palette(np.array([[50.0, 0, 0], [50, 2.5, 0]]), np.array([0.5, 0.5]))
    b = Palette(np.array([[50.0, 0, 0], [73, 25, -18]]), np.array([0.75, 0.25]))
    to_grey = palette_distance(single(50, 2.5, 0), single(50, 0, 0))
    assert palette_distance(a, b) == pytest.approx(0.25 * to_grey + 0.25 * 27.1492, abs=1e-4)


def test_a_palette_is_the_colours_and_their_shares():
    red, blue = torch.tensor([[0.9, 0.1, 0.1]]), torch.tensor([[0.1, 0.1, 0.9]])
    colours, weights = palette(torch.cat([blue.expand(30, 3), red.expand(90, 3)]))
    np.testing.assert_allclose(weights, [0.75, 0.25])
    np.testing.assert_allclose(colours, rgb2lab(np.array([[0.9, 0.1, 0.1], [0.1, 0.1, 0.9]])), atol=1e-4)


def test_palettes_repeat_whatever_the_order_of_the_pixels():
    pixels = torch.rand(300, 3, generator=torch.Generator().manual_seed(0))
    first, again = palette(pixels, k=5), palette(pixels.flip(0), k=5)
    assert np.array_equal(first.colours, again.colours)
    assert np.array_equal(first.weights, again.weights)
    assert len(first.weights) == 5
    assert first.weights.sum() == pytest.approx(1)


def test_the_distance_is_zero_for_itself_and_symmetric():
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        a, b = (palette(torch.rand(200, 3, generator=generator)) for _ in range(2))
        assert palette_distance(a, a) == pytest.approx(0, abs=1e-9)
        assert palette_distance(a, b) > 1
        assert palette_distance(a, b) == pytest.approx(palette_distance(b, a), rel=1e-9)


def test_the_distance_grows_with_the_change_of_hue():
    start = palette(hue(0.0))
    distances = [palette_distance(start, palette(hue(value))) for value in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)]
    assert distances == sorted(distances)
    assert distances[0] < 1e-9 < 10 < distances[2]


def test_true_videos_match_their_own_prompt_and_no_other():
    world = Toyworld(ToyworldConfig(size=32, frames=2))
    examples = [world[i] for i in range(40)]
    own = [video_palette_distance(example.video, example.image) for example in examples]
    shuffled = [
        video_palette_distance(example.video, examples[i - 1].image) for i, example in enumerate(examples)
    ]
    means = [float(np.mean([score.distance for score in scores])) for scores in (own, shuffled)]
    assert means[0] < 3  # 2.2 and 42.3 when this was written, over 4 frames
    assert means[1] > 30
    assert all(a.distance < b.distance for a, b in zip(own, shuffled, strict=True))
    assert all(score.found == 1 for score in own)


def test_frames_without_a_subject_count_as_their_background():
    example = Toyworld(ToyworldConfig(size=32, frames=2))[0]
    whole = video_palette_distance(example.video, example.image)
    sky = example.video[:1, :, :1, :1].expand(1, 3, 32, 32)
    empty = video_palette_distance(sky, example.image)
    half = video_palette_distance(torch.cat([example.video, sky, sky]), example.image)
    assert (whole.found, empty.found, half.found) == (1, 0, 0.5)
    assert empty.distance > 20 * whole.distance
    assert half.distance == pytest.approx((whole.distance + empty.distance) / 2)


def test_known_masks_replace_the_segmentation():
    example = Toyworld(ToyworldConfig(size=32, frames=2))[3]
    assert video_palette_distance(example.video, example.image, masks=example.mask).distance < 5
    background = video_palette_distance(example.video, example.image, masks=~example.mask)
    assert background.distance > 20
    with pytest.raises(ValueError, match=r"masks is torch\.bool of shape \(1, 32, 32\).*\(2, 32, 32\)"):
        video_palette_distance(example.video, example.image, masks=example.mask[:1])


@pytest.mark.parametrize(
    ("pixels", "k", "message"),
    [
        (torch.rand(0, 3), 3, "pixels has shape"),
        (torch.rand(4, 4), 3, "n 3"),
        (torch.rand(4, 3), 0, "k is 0"),
    ],
)
def test_bad_palettes_are_refused(pixels, k, message):
    with pytest.raises(ValueError, match=message):
        palette(pixels, k)
