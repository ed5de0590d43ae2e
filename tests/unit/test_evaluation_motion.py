"""Motion is measured where it is known: the toy world's poses, and pictures that are moved."""

from __future__ import annotations

import math
import sys
from functools import cache

import numpy as np
import pytest
import torch
from einops import rearrange
from numpy.typing import NDArray
from skimage import data, transform
from torch import Tensor

from dit_booth.data.toyworld import Identity, Toyworld, ToyworldConfig
from dit_booth.evaluation.case import Case, Values
from dit_booth.evaluation.catalogue import CATALOGUE
from dit_booth.evaluation.motion import (
    dynamic_degree,
    flow_scores,
    moments,
    motion_scores,
    opencv_flow,
    to_bytes,
)

torch.set_num_threads(1)
SIDE = 96


def case(video: Tensor) -> Case:
    return Case(video=video, image=torch.ones(3, 8, 8), caption="a cat runs")


def values(scores: dict[str, Values], name: str) -> NDArray[np.float64]:
    """The values of the frames that have one."""
    per_frame = scores[name]
    assert isinstance(per_frame, np.ndarray)
    return per_frame[~np.isnan(per_frame)]


def noisy(video: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (video + sigma * torch.randn(video.shape, generator=generator)).clamp(-1, 1)


# ---- a subject whose pose is known -------------------------------------------------------------------------


@cache
def scene(motion: str, shapes: tuple[str, ...] = ()) -> tuple[Identity, Tensor]:
    world = Toyworld(ToyworldConfig())
    for index in range(1000):
        example = world[index]
        assert example.identity is not None
        identity = Identity(**example.identity)
        if identity.motion == motion and (not shapes or identity.shape in shapes):
            return identity, example.video
    raise AssertionError(f"no {motion} {shapes}")


@pytest.mark.parametrize("motion", ["left", "right", "up", "down"])
def test_speed_is_the_distance_of_the_known_centres(motion: str) -> None:
    identity, video = scene(motion)
    scores = motion_scores(case(video))
    truth = math.dist(identity.start, identity.end) / 7
    assert values(scores, "speed") == pytest.approx([truth] * 7, abs=0.01)
    assert values(scores, "growth").max() < 0.05


@pytest.mark.parametrize(("motion", "sizes"), [("growing", (0.65, 1.2)), ("shrinking", (1.2, 0.65))])
def test_growth_is_relative_to_the_size_before(motion: str, sizes: tuple[float, float]) -> None:
    _, video = scene(motion)
    scores = motion_scores(case(video))
    known = np.linspace(*sizes, 8)
    assert values(scores, "growth") == pytest.approx(np.abs(known[1:] / known[:-1] - 1), abs=0.03)
    assert values(scores, "speed").max() < 0.02


@pytest.mark.parametrize("shape", ["diamond", "arrow", "crescent", "drop"])
def test_rotation_is_that_of_the_main_axis(shape: str) -> None:
    identity, video = scene("spinning", (shape,))
    scores = motion_scores(case(video))
    assert values(scores, "rotation").mean() == pytest.approx(math.degrees(abs(identity.turn)) / 7, abs=1)


@pytest.mark.parametrize("shape", ["square", "star", "flower", "ring"])
def test_what_is_as_wide_as_long_has_no_rotation(shape: str) -> None:
    _, video = scene("spinning", (shape,))
    assert not len(values(motion_scores(case(video)), "rotation"))


def test_a_still_video_has_neither_motion_nor_flicker() -> None:
    _, video = scene("right")
    still = case(video[:1].expand(4, -1, -1, -1))
    for name, score in {**motion_scores(still), **flow_scores(still)}.items():
        assert not np.nan_to_num(score).any(), name
        assert name == "flicker" or CATALOGUE[name].better == 0, "stillness is best in no measure of motion"


def test_noise_is_flicker_and_hardly_motion() -> None:
    _, moving = scene("right")
    _, resting = scene("still")
    loud, quiet, clean = (motion_scores(case(noisy(resting, sigma))) for sigma in (0.1, 0.05, 0.0))
    assert values(clean, "flicker").max() == 0
    # Half the mean absolute difference of two normal values: sigma / sqrt(pi), less what is clipped at white.
    assert 0.6 < values(quiet, "flicker").mean() / (0.05 / math.sqrt(math.pi)) <= 1.02
    assert values(loud, "flicker").mean() > 1.6 * values(quiet, "flicker").mean()
    for name, known in (("speed", moving), ("growth", scene("growing")[1])):
        assert values(quiet, name).mean() < 0.1 * values(motion_scores(case(known)), name).mean()


def test_flicker_leaves_the_moving_subject_out() -> None:
    _, moving = scene("right")
    changes = (moving[1:] - moving[:-1]).abs().mean() / 2
    assert values(motion_scores(case(moving)), "flicker").max() < 0.01 * float(changes)


def test_a_frame_without_subject_has_no_motion_and_all_background() -> None:
    _, video = scene("right")
    gone = video.clone()
    gone[3] = video[3, :, :1, :1]
    scores = motion_scores(case(gone))
    for name in ("speed", "growth"):
        assert np.flatnonzero(np.isnan(scores[name])).tolist() == [0, 3, 4]
    assert len(values(scores, "flicker")) == 7


def test_masks_may_be_given() -> None:
    picture = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1
    masks = torch.zeros(3, 40, 60, dtype=torch.bool)
    for frame in range(3):
        masks[frame, 5 + 3 * frame : 15 + 3 * frame, 10 + 4 * frame : 30 + 4 * frame] = True
    scores = motion_scores(case(picture.expand(3, -1, -1, -1)), masks=masks)
    assert values(scores, "speed") == pytest.approx([5 / 40] * 2)  # of the shorter side
    assert values(scores, "rotation") == pytest.approx([0, 0])
    everywhere = motion_scores(case(picture.expand(3, -1, -1, -1)), masks=torch.ones_like(masks))
    assert not len(values(everywhere, "flicker"))
    with pytest.raises(ValueError, match=r"masks is torch.bool of shape \(2, 40, 60\); it must be"):
        motion_scores(case(picture.expand(3, -1, -1, -1)), masks=masks[:2])


def test_moments_of_a_bar_are_those_of_a_rectangle() -> None:
    bar = np.zeros((60, 60), bool)
    bar[20:24, 10:40] = True
    assert moments(bar) == pytest.approx((24.5, 21.5, math.sqrt(120), 0))
    assert moments(bar.T)[3] == pytest.approx(90)
    assert all(math.isnan(value) for value in moments(np.zeros((4, 4), bool)))


# ---- pictures that are moved -------------------------------------------------------------------------------


@cache
def picture(name: str) -> NDArray[np.float64]:
    return np.asarray(transform.rescale(getattr(data, name)(), 0.6, channel_axis=2, anti_aliasing=True))


def panned(name: str, x: int, y: int, frames: int = 5) -> Tensor:
    """A window that moves over a picture by (x, y) pixels a frame."""
    whole = picture(name)
    windows = [whole[20 + y * i : 20 + y * i + SIDE, 20 + x * i : 20 + x * i + SIDE] for i in range(frames)]
    assert all(window.shape[:2] == (SIDE, SIDE) for window in windows)
    return rearrange(torch.from_numpy(np.stack(windows)).float() * 2 - 1, "f h w c -> f c h w")


@pytest.mark.parametrize("name", ["chelsea", "coffee", "astronaut"])
@pytest.mark.parametrize(("x", "y"), [(1, 0), (0, 3), (4, 3)])
def test_the_flow_of_a_panned_picture_is_the_pan(name: str, x: int, y: int) -> None:
    pytest.importorskip("cv2")
    video = panned(name, x, y)
    scores = flow_scores(case(video))
    assert values(scores, "flow") * SIDE == pytest.approx([math.hypot(x, y)] * 4, rel=0.15)
    assert scores["dynamic_degree"] == float(math.hypot(x, y) > 6 * SIDE / 256)
    one, two = to_bytes(video[:2])
    assert np.median(opencv_flow(one, two), axis=(0, 1)) == pytest.approx([-x, -y], abs=0.1)


def test_a_faster_video_is_thinned_to_eight_frames_a_second() -> None:
    pytest.importorskip("cv2")
    slow = case(panned("chelsea", 1, 0, frames=9))
    assert flow_scores(slow)["dynamic_degree"] == 0
    assert flow_scores(slow, fps=32)["dynamic_degree"] == 1  # four pixels in an eighth of a second
    assert flow_scores(slow, fps=8)["flow"] == pytest.approx(flow_scores(slow, fps=32)["flow"], nan_ok=True)


def test_noise_on_a_still_picture_is_not_dynamic() -> None:
    pytest.importorskip("cv2")
    scores = flow_scores(case(noisy(panned("chelsea", 0, 0), 0.05)))
    assert scores["dynamic_degree"] == 0
    assert values(scores, "flow").max() * SIDE < 0.5


@pytest.mark.parametrize("frames", [2, 5, 6, 16, 33])
def test_the_dynamic_degree_follows_vbenchs_rule(frames: int) -> None:
    threshold, needed = 6 * 40 / 256, max(1, round(frames / 4))

    def moving(pairs: int, share: float, length: float) -> float:
        lengths = [np.zeros((40, 60)) for _ in range(frames - 1)]
        for flow in lengths[:pairs]:
            flow.ravel()[: int(2400 * share)] = length
        return dynamic_degree(lengths)

    assert moving(needed, 0.05, 1.01 * threshold) == 1
    assert moving(needed, 0.05, 0.99 * threshold) == 0
    assert moving(needed - 1, 1.0, 100 * threshold) == 0
    assert moving(needed, 0.04, 1.2 * threshold) == 0, "the mean of the top 5 %"
    assert moving(frames - 1, 1.0, 1.01 * threshold) == 1


def test_one_frame_has_no_motion() -> None:
    one = case(panned("chelsea", 0, 0, frames=1))
    for scores in (motion_scores(one), flow_scores(one)):
        for name, score in scores.items():
            assert np.isnan(score).all(), name
            assert np.shape(score) == (() if CATALOGUE[name].level == "video" else (1,))


def test_a_flow_may_be_given_and_is_checked() -> None:
    video = case(panned("chelsea", 0, 0, frames=3))
    scores = flow_scores(video, flow=lambda one, two: np.full((SIDE, SIDE, 2), (3.0, 4.0)))
    assert values(scores, "flow") == pytest.approx([5 / SIDE] * 2)
    assert scores["dynamic_degree"] == 1
    with pytest.raises(ValueError, match=r"flow returned shape \(2, 96, 96\); it must be \(h, w, 2\)"):
        flow_scores(video, flow=lambda one, two: np.zeros((2, SIDE, SIDE)))
    with pytest.raises(ValueError, match="fps is 0"):
        flow_scores(video, fps=0)


def test_without_opencv_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        flow_scores(case(panned("chelsea", 0, 0, frames=2)))
    assert "speed" in motion_scores(case(scene("right")[1]))


def test_a_video_too_small_for_the_flow_is_an_error() -> None:
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match="the video is 8 x 20 pixels; optical flow needs 12 or more"):
        flow_scores(case(torch.zeros(2, 3, 8, 20)))
