"""Read and write videos with PyAV.

FFmpeg decodes a truncated file without complaint and simply stops early. So a file's header is compared with
the
file: an index that points beyond the end of the file is an error before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.files import replacing

# Visually lossless, and small enough to put on a web page (PSNR above 40 dB).
_X264 = {"crf": "18", "preset": "medium"}


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself: frames, frames per second, and pixels."""

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | Path) -> VideoInfo:
    """Read a video's header, and check that the file is as long as the header says; decodes nothing.

    Raises:
        ValueError: the file is missing, is no video, or is truncated.
    """
    with _open(path) as container:
        return _header(path, container)


def read_video(
    path: str | Path, *, start: int = 0, frames: int | None = None, stride: int = 1
) -> NDArray[np.uint8]:
    """Decode frames `start`, `start + stride`, ... of a video.

    The file is decoded in order from its beginning: exact for every codec, where seeking is only as good as a
    file's index. Flipped bits that still decode cannot be noticed here (H.264 holds no checksum); missing
    ones are.

    Args:
        path: any file that FFmpeg reads.
        start: first frame, from 0.
        frames: how many frames; all that remain where it is None.
        stride: distance between frames.

    Returns:
        `f h w 3`, RGB.

    Raises:
        ValueError: the file is missing, broken or truncated, or holds fewer frames than are asked for.
    """
    for name, value, low in (
        ("start", start, 0),
        ("frames", 1 if frames is None else frames, 1),
        ("stride", stride, 1),
    ):
        if value < low:
            raise ValueError(f"data.{name} is {value}; it must be at least {low}")
    with _open(path) as container:
        info = _header(path, container)
        if frames is None:
            frames = max(0, -((start - info.frames) // stride))
        check_length(path, info, start=start, frames=frames, stride=stride)
        wanted = range(start, start + frames * stride, stride)
        pictures, decoded = [], 0
        for frame in container.decode(video=0):
            if decoded in wanted:
                pictures.append(frame.to_ndarray(format="rgb24"))
            decoded += 1
            if len(pictures) == frames:
                return np.stack(pictures)
    raise ValueError(
        f"{path}: decoded {decoded} frames, expected {info.frames}; the file is truncated or damaged: "
        "replace it, or leave it out"
    )


def check_length(path: str | Path, info: VideoInfo, *, start: int, frames: int, stride: int) -> None:
    """Refuse to read more frames than a video has.

    Raises:
        ValueError: naming the file, the numbers and the options to change.
    """
    needed = start + (frames - 1) * stride + 1
    if frames < 1 or needed > info.frames:
        raise ValueError(
            f"{path}: data.frames={frames} at data.triplets.stride={stride} from frame {start} needs {needed} frames, "
            f"and the video has {info.frames}; lower data.frames or data.triplets.stride, or leave the video out"
        )


def write_video(path: str | Path, video: Tensor, *, fps: float) -> None:
    """Write an H.264 mp4 that every browser plays (yuv420p, index first).

    The format needs even sides: an odd side is padded by repeating its last row or column. The file appears
    under its name only when it is complete.

    Args:
        path: ends in `.mp4`; folders are made.
        video: `f 3 h w` in [-1, 1]; values beyond are clamped.
        fps: frames per second.

    Raises:
        ValueError: the path is no mp4, or the video has the wrong shape, is not finite, or `fps` is not
        positive.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"path is {str(path)!r}; write_video writes .mp4 files: give it that suffix")
    if video.ndim != 4 or video.shape[1] != 3 or video.numel() == 0:
        raise ValueError(f"video has shape {tuple(video.shape)}; it must be (f 3 h w), not empty")
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be positive")
    values = video.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError(
            "video holds NaN or infinity; look for the step that made them: they cannot be shown"
        )
    pictures = rearrange((values.clamp(-1, 1) + 1) * 127.5, "f c h w -> f h w c").round().byte().numpy()
    _, height, width, _ = pictures.shape
    pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with replacing(path) as partial:
        _encode(partial, pictures, Fraction(fps).limit_denominator(1001))


def _encode(path: Path, pictures: NDArray[np.uint8], rate: Fraction) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=_X264)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file; check the path")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(
            f"{path}: not a readable video ({error.strerror}); replace it, or leave it out"
        ) from error


def _header(path: str | Path, container: InputContainer) -> VideoInfo:
    if not container.streams.video:
        raise ValueError(f"{path}: holds no video stream; replace it, or leave it out")
    stream = container.streams.video[0]
    size = Path(path).stat().st_size
    present = sum(1 for entry in stream.index_entries if entry.pos + entry.size <= size)
    frames = stream.frames
    if frames == 0:  # a container that does not say (Matroska): count the packets, which reads the file once
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    elif len(stream.index_entries) and present < min(frames, len(stream.index_entries)):
        raise ValueError(
            f"{path}: truncated: {present} frames are there, expected {frames}; replace it, or leave it out"
        )
    if frames == 0 or stream.average_rate is None:
        raise ValueError(f"{path}: holds no frames; replace it, or leave it out")
    return VideoInfo(frames=frames, fps=float(stream.average_rate), height=stream.height, width=stream.width)
