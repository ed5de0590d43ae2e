"""Read and write videos with PyAV, and write GIFs with Pillow.

FFmpeg decodes a truncated file without an error and stops early. So the header is compared with the file: an
index that points beyond the file's end is an error before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dit_booth.files import replacing

# Visually lossless, and small enough for a web page.
_X264 = {"crf": "18", "preset": "medium"}
_INDEX_FIRST = {"movflags": "+faststart"}


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video file's header: number of frames, frames per second, and size in pixels."""

    frames: int
    fps: float
    height: int
    width: int


def probe(path: str | Path) -> VideoInfo:
    """Read a video's header, and check that the file is as long as the header says, without decoding.

    Raises:
        ValueError: the file is missing, is no video, or is truncated.
    """
    with _open(path) as container:
        return _header(path, container)


def read_video(
    path: str | Path, *, start: int = 0, frames: int | None = None, stride: int = 1
) -> NDArray[np.uint8]:
    """Decode frames `start`, `start + stride`, ... of a video.

    The file is decoded in order from its beginning: this is exact for every codec, and seeking is not.
    Flipped bits that still decode are not detected (H.264 has no checksum); missing data is.

    Args:
        path: any file that FFmpeg reads.
        start: first frame, from 0.
        frames: number of frames; None: all that remain.
        stride: distance between frames.

    Returns:
        `f h w 3`, RGB.

    Raises:
        ValueError: the file is missing, broken or truncated, or has too few frames.
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
    """Raise an error if a video has fewer frames than a window needs.

    Raises:
        ValueError: naming the file, both lengths, and the options to change.
    """
    needed = start + (frames - 1) * stride + 1
    if frames < 1 or needed > info.frames:
        raise ValueError(
            f"{path}: data.frames={frames} at data.triplets.stride={stride} from frame {start} needs {needed} frames, "
            f"and the video has {info.frames}; lower data.frames or data.triplets.stride, or leave the video out"
        )


def write_video(
    path: str | Path, video: Tensor, *, fps: float, lossless: bool = False, joinable: bool = False
) -> None:
    """Write an H.264 mp4 that every browser plays (yuv420p, index first).

    The format needs even sides: an odd side is padded by repeating its last row or column. The file appears
    under its name only when it is complete.

    Args:
        path: ends in `.mp4`; folders are made.
        video: `f 3 h w` in [-1, 1]; values beyond are clamped.
        fps: frames per second.
        lossless: keep every pixel (RGB, quantizer 0), of odd sides too; for programs: few browsers play such a file.
        joinable: no frame refers to later ones, so that `join_videos` can put the file before or after others.

    Raises:
        ValueError: the path is not an .mp4 file, or the video has the wrong shape, is not finite, or `fps` is not
        positive.
    """
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"path is {str(path)!r}; write_video writes .mp4 files: give it that suffix")
    pictures = _to_pixels(video, fps)
    _, height, width, _ = pictures.shape
    if not lossless:
        pictures = np.pad(pictures, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with replacing(path) as partial:
        _encode(partial, pictures, Fraction(fps).limit_denominator(1001), lossless, joinable)


def join_videos(path: Path, parts: Sequence[Path]) -> None:
    """Write videos after each other into one .mp4 file, without encoding them again; it appears when it is complete.

    parts: written by `write_video` with ``joinable=True``, with equal sizes and frame rates.
    """
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4", options=_INDEX_FIRST) as joined:
        stream, start = None, 0
        for part in parts:
            with _open(part) as container:
                source = container.streams.video[0]
                stream = stream or joined.add_stream_from_template(source)
                for packet in container.demux(source):
                    if packet.dts is None or packet.pts is None:  # the end of the file
                        continue
                    packet.dts, packet.pts, packet.stream = packet.dts + start, packet.pts + start, stream
                    joined.mux(packet)
                start += source.duration or 0


def write_gif(path: str | Path, video: Tensor, *, fps: float) -> None:
    """Write an animated GIF that repeats without end, with a palette of 256 colors for each frame.

    GIF stores the duration of a frame in units of 10 ms, and browsers slow down below 20 ms: 50 fps at most. The
    file appears under its name only when it is complete.

    Args:
        path: ends in `.gif`; folders are made.
        video: `f 3 h w` in [-1, 1]; values beyond are clamped.
        fps: frames per second, at most 50.

    Raises:
        ValueError: the path is not a .gif file, the video has the wrong shape or is not finite, or `fps` is not in
        (0, 50].
    """
    path = Path(path)
    if path.suffix != ".gif":
        raise ValueError(f"path is {str(path)!r}; write_gif writes .gif files: give it that suffix")
    if fps > 50:
        raise ValueError(f"fps is {fps}; a GIF shows at most 50 frames per second: write a .mp4 file")
    first, *others = (Image.fromarray(picture) for picture in _to_pixels(video, fps))
    # Equal consecutive frames are merged by Pillow, with the sum of their durations.
    duration = max(10, 10 * round(100 / fps))
    with replacing(path) as partial:
        first.save(partial, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)


def _to_pixels(video: Tensor, fps: float) -> NDArray[np.uint8]:
    """Check a video `f 3 h w` in [-1, 1], and return it as `f h w 3`."""
    if video.ndim != 4 or video.shape[1] != 3 or video.numel() == 0:
        raise ValueError(f"video has shape {tuple(video.shape)}; it must be (f 3 h w), not empty")
    if not fps > 0:
        raise ValueError(f"fps is {fps}; it must be positive")
    values = video.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise ValueError("video contains NaN or infinity; find the step that produces them")
    return rearrange((values.clamp(-1, 1) + 1) * 127.5, "f c h w -> f h w c").round().byte().numpy()


def _encode(path: Path, pictures: NDArray[np.uint8], rate: Fraction, lossless: bool, joinable: bool) -> None:
    with av.open(str(path), "w", format="mp4", options=_INDEX_FIRST) as container:
        codec, options = ("libx264rgb", {"qp": "0"}) if lossless else ("libx264", _X264)
        options = options | {"bf": "0"} if joinable else options
        stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


@contextmanager
def _open(path: str | Path) -> Iterator[InputContainer]:
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; check the path")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.FFmpegError as error:
        raise ValueError(
            f"{path}: not a readable video ({error.strerror}); replace it, or leave it out"
        ) from error


def _header(path: str | Path, container: InputContainer) -> VideoInfo:
    if not container.streams.video:
        raise ValueError(f"{path}: has no video stream; replace it, or leave it out")
    stream = container.streams.video[0]
    size = Path(path).stat().st_size
    present = sum(1 for entry in stream.index_entries if entry.pos + entry.size <= size)
    frames = stream.frames
    if frames == 0:  # Matroska stores no count: read the file once and count packets
        frames = sum(1 for packet in container.demux(stream) if packet.size)
        container.seek(0)
    elif len(stream.index_entries) and present < min(frames, len(stream.index_entries)):
        raise ValueError(
            f"{path}: truncated: {present} frames are there, expected {frames}; replace it, or leave it out"
        )
    if frames == 0 or stream.average_rate is None:
        raise ValueError(f"{path}: has no frames; replace it, or leave it out")
    return VideoInfo(frames=frames, fps=float(stream.average_rate), height=stream.height, width=stream.width)
