"""`Video`: frames, files and what a notebook shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_booth.data.video import probe, read_video
from dit_booth.sampling.video import Video


@pytest.fixture
def video() -> Video:
    grey = torch.linspace(-1, 1, 20).expand(
        16, 20
    )  # without fine colours, which H.264 stores at half the size
    frames = torch.stack([grey.roll(4 * i, dims=1).expand(3, 16, 20) for i in range(5)])
    return Video.from_tensor(frames, fps=4, text="a <star>", image=torch.ones(3, 8, 8))


def test_frames_and_tensor_agree(video: Video) -> None:
    assert video.frames.shape == (5, 16, 20, 3) and len(video) == 5
    again = Video.from_tensor(video.tensor, fps=4)
    assert np.array_equal(again.frames, video.frames) and again.image is None
    assert repr(video) == "Video(5 frames of 16 x 20, 4 fps, text='a <star>')"


def test_it_is_saved_by_its_suffix(video: Video, tmp_path: Path) -> None:
    mp4 = video.save(tmp_path / "new" / "x.mp4")
    found = probe(mp4)
    assert (found.frames, found.fps, found.height, found.width) == (5, 4.0, 16, 20)
    assert np.abs(read_video(mp4).astype(int) - video.frames).mean() < 10
    with Image.open(video.save(tmp_path / "x.gif")) as gif:
        assert gif.n_frames == 5 and gif.size == (20, 16)  # type: ignore[attr-defined]
    with Image.open(video.save(tmp_path / "sheets" / "x.png")) as sheet:
        assert sheet.width > 5 * 96
    with pytest.raises(ValueError, match=r"x.avi'; give it the suffix .mp4, .gif or .png"):
        video.save(tmp_path / "x.avi")


def test_a_notebook_shows_it(video: Video) -> None:
    html = video._repr_html_()
    assert html.startswith('<img src="data:image/gif;base64,') and "a &lt;star&gt;" in html
