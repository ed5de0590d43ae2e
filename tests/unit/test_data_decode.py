"""Decoding: seeking gives what decoding in order gives; unusual files are upright and exact, or refused by name."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from odd_videos import ramp, write

from dit_booth.data.video import decoder, probe, read_video


def levels(pictures: np.ndarray) -> list[int]:
    """The number of each frame of a ramp, from its grey level."""
    return [round((int(p[:, 20:].mean()) - 16) / 5) for p in pictures]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decode")
    gop = {"x264-params": "keyint=8:min-keyint=8:scenecut=0:bframes=2:qp=10"}
    irregular = np.cumsum(np.random.default_rng(0).integers(20, 300, 40)).tolist()
    write(root / "gop.mp4", ramp(40), options=gop)
    write(root / "open.mp4", ramp(40), options={"x264-params": gop["x264-params"] + ":open-gop=1"})
    write(root / "variable.mp4", ramp(40), options=gop, stamps=irregular)
    write(root / "gop.mkv", ramp(40), options=gop)
    write(root / "deep.mp4", ramp(12), pixels="yuv420p10le", options={"qp": "4"})
    write(root / "odd.mp4", ramp(12, 33, 47), pixels="yuv444p")
    write(root / "turned.mp4", ramp(12), rotation=90)
    write(root / "interlaced.mp4", ramp(12), options={"x264-params": "interlaced=1"})
    write(root / "alpha.mov", ramp(12), codec="qtrle", pixels="argb")
    return root


@pytest.mark.parametrize("name", ["gop.mp4", "open.mp4", "variable.mp4", "gop.mkv"])
@pytest.mark.parametrize("start", [0, 1, 7, 8, 9, 17, 31])
def test_a_window_from_the_middle_is_that_of_the_whole(folder: Path, name: str, start: int) -> None:
    whole = read_video(folder / name)
    assert levels(whole) == list(range(40)), "the fixture tells its frames apart"
    window = read_video(folder / name, start=start, frames=3, stride=4)
    assert (window == whole[start : start + 9 : 4]).all()


def test_most_of_a_video_is_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_booth.data import video

    seen = []
    of_file = video._decode
    monkeypatch.setattr(
        video, "_decode", lambda c, first, wanted: (seen.append(first), of_file(c, first, wanted))[1]
    )
    read_video(folder / "gop.mp4", start=30, frames=2)
    assert seen == [24], "the last of the keyframes, one every eight frames, at or before frame 30"


def test_ten_bits_and_odd_sizes(folder: Path) -> None:
    assert levels(read_video(folder / "deep.mp4")) == list(range(12))
    assert probe(folder / "odd.mp4").height == 33 and read_video(folder / "odd.mp4").shape == (12, 33, 47, 3)


def test_a_turned_video_is_upright_as_another_decoder_shows_it(folder: Path) -> None:
    import cv2

    info, pictures = probe(folder / "turned.mp4"), read_video(folder / "turned.mp4")
    assert (info.height, info.width) == pictures.shape[1:3] == (48, 32)
    shown = cv2.cvtColor(cv2.VideoCapture(str(folder / "turned.mp4")).read()[1], cv2.COLOR_BGR2RGB)
    assert np.abs(shown.astype(int) - pictures[0]).mean() < 3


@pytest.mark.parametrize(
    ("name", "words"), [("interlaced.mp4", "interlaced"), ("alpha.mov", "alpha channel")]
)
def test_what_would_look_wrong_is_refused(folder: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*{words}.*leave it out"):
        probe(folder / name)


def test_the_decoder_has_a_version() -> None:
    assert av.__version__ in decoder()
