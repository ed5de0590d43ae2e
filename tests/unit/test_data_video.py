"""Videos survive being written and read."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import probe, read_video, write_gif, write_video

torch.set_num_threads(1)


def numbered(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """A video whose frame `i` is grey at `i / frames`: a frame's brightness tells its number."""
    grey = torch.linspace(-1, 1, frames).view(frames, 1, 1, 1)
    return grey.expand(frames, 3, height, width).clone()


def numbers(pictures: np.ndarray, frames: int) -> list[int]:
    return [round(float(picture.mean()) / 255 * (frames - 1)) for picture in pictures]


def as_float(pictures: np.ndarray) -> torch.Tensor:
    return rearrange(torch.from_numpy(pictures), "f h w c -> f c h w").float() / 127.5 - 1


def test_a_video_comes_back_nearly_as_it_was(tmp_path: Path):
    video = Toyworld(ToyworldConfig(size=96, frames=6))[3].video
    write_video(tmp_path / "deep" / "clip.mp4", video, fps=8)
    again = as_float(read_video(tmp_path / "deep" / "clip.mp4"))
    assert again.shape == video.shape
    psnr = 10 * torch.log10(4 / (again - video).square().mean())
    assert psnr > 30  # chroma is stored at half the resolution, and toys have hard edges between colours
    grey = video.mean(dim=1, keepdim=True).expand_as(video)
    write_video(tmp_path / "grey.mp4", grey, fps=8)
    assert 10 * torch.log10(4 / (as_float(read_video(tmp_path / "grey.mp4")) - grey).square().mean()) > 38


def test_the_header_says_what_was_written(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", numbered(5), fps=7.5)
    info = probe(tmp_path / "clip.mp4")
    assert (info.frames, info.fps, info.height, info.width) == (5, 7.5, 32, 48)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({}, list(range(20))),
        ({"start": 3, "frames": 4}, [3, 4, 5, 6]),
        ({"frames": 4, "stride": 5}, [0, 5, 10, 15]),
        ({"start": 1, "frames": 7, "stride": 3}, [1, 4, 7, 10, 13, 16, 19]),
        ({"start": 2, "stride": 6}, [2, 8, 14]),
        ({"start": 19}, [19]),
    ],
)
def test_the_window_is_exact(tmp_path: Path, window, expected):
    write_video(tmp_path / "clip.mp4", numbered(20), fps=10)
    assert numbers(read_video(tmp_path / "clip.mp4", **window), 20) == expected


def test_odd_sides_are_padded_by_their_edge(tmp_path: Path):
    video = Toyworld(ToyworldConfig(size=33, frames=2))[0].video[..., :31]
    write_video(tmp_path / "odd.mp4", video, fps=4)
    again = as_float(read_video(tmp_path / "odd.mp4"))
    assert again.shape == (2, 3, 34, 32)
    assert (again[:, :, :33, :31] - video).abs().mean() < 0.05
    assert (again[:, :, -1] - again[:, :, -2]).abs().mean() < 0.05


def test_the_file_plays_in_a_browser(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", numbered(4), fps=10)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_values_beyond_the_range_are_clamped(tmp_path: Path):
    write_video(tmp_path / "clip.mp4", torch.full((2, 3, 16, 16), 1.7), fps=10)
    assert read_video(tmp_path / "clip.mp4").min() >= 253


def test_a_container_without_a_frame_count_is_counted(tmp_path: Path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for value in range(7):
            picture = np.full((32, 32, 3), value * 40, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    assert probe(path).frames == 7
    assert numbers(read_video(path, start=1, frames=3, stride=2) / 240 * 255, 7) == [1, 3, 5]


def test_a_failed_write_leaves_the_old_file_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "clip.mp4"
    write_video(path, numbered(3), fps=10)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr("dit_booth.data.video.av.VideoFrame", type("Frame", (), {"from_ndarray": fail}))
    with pytest.raises(RuntimeError, match="disk full"):
        write_video(path, numbered(5), fps=10)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_gif_shows_the_same_frames_at_the_same_speed_without_end(tmp_path: Path):
    video = Toyworld(ToyworldConfig(size=32, frames=6))[3].video
    write_gif(tmp_path / "deep" / "clip.gif", video, fps=8)
    with Image.open(tmp_path / "deep" / "clip.gif") as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (6, 0, 120)
        for i in range(6):
            gif.seek(i)
            shown = as_float(np.array(gif.convert("RGB"))[None])[0]
            assert (shown - video[i]).abs().mean() < 0.02
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["clip.gif"]


def test_a_gif_of_one_frame_and_a_failed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "clip.gif"
    write_gif(path, numbered(1), fps=10)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_gif(path, numbered(5), fps=10)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["clip.gif"]
