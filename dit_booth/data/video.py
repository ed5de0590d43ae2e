"""Read and write videos with PyAV, and write GIFs with Pillow.

FFmpeg decodes a truncated file without an error and stops early. So the header is compared with the file: an
index that points beyond the file's end is an error before anything is decoded.

PyAV is the decoder: `experiments/bench/data.py` compares it with others. Frames count in the order of presentation,
whatever their timestamps are, and are turned upright as the file's display matrix says.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
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

from dit_booth.data.media import Media, is_file, open_media, size_of
from dit_booth.files import NO_ROOM, replacing

# Visually lossless, and small enough for a web page.
_X264 = {"crf": "18", "preset": "medium"}
_INDEX_FIRST = {"movflags": "+faststart"}


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """A video file's header: number of frames, frames per second (average), and upright size in pixels."""

    frames: int
    fps: float
    height: int
    width: int


def decoder() -> str:
    """Return name and version of the decoder: another one may give other frames of the same file."""
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"pyav {av.__version__}, libavcodec {codec}"


def probe(path: str | Media) -> VideoInfo:
    """Read a video's header, and check that the file is as long as the header says; decodes one frame at most.

    Raises:
        ValueError: the file is missing, is no video, is truncated, interlaced or transparent.
    """
    with _open(path) as container:
        info = _header(path, container)
        frame = next(container.decode(video=0), None)  # the display matrix comes with it
        if frame is None:
            raise ValueError(f"{path}: no frame can be decoded; replace it, or leave it out")
        if frame.interlaced_frame:
            raise ValueError(f"{path}: is interlaced; deinterlace it (ffmpeg -vf yadif), or leave it out")
        if frame.rotation % 180:
            info = replace(info, height=info.width, width=info.height)
        return info


def read_video(
    path: str | Media, *, start: int = 0, frames: int | None = None, stride: int = 1
) -> NDArray[np.uint8]:
    """Decode frames `start`, `start + stride`, ... of a video.

    Decoding begins at the last keyframe before `start`, if the packets' timestamps tell where that is, else at the
    beginning; frames are then found by their timestamps, so both give the same.
    Flipped bits that still decode are not detected (H.264 has no checksum); missing data is.

    Args:
        path: any file that FFmpeg reads, or one in a tar archive.
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
        pictures, decoded = _decode(container, _seek(container, start) if start else 0, wanted)
    if len(pictures) == frames:
        return np.stack(pictures)
    raise ValueError(
        f"{path}: decoded {decoded} frames, expected {info.frames}; the file is truncated or damaged: "
        "replace it, or leave it out"
    )


def _decode(container: InputContainer, first: int, wanted: range) -> tuple[list[NDArray[np.uint8]], int]:
    """Decode from frame `first` on until all `wanted` frames are there; return them, and the frames passed."""
    pictures: list[NDArray[np.uint8]] = []
    number = first
    for frame in container.decode(video=0):
        if number in wanted:
            pictures.append(_upright(frame))
        number += 1
        if number > wanted[-1]:
            break
    return pictures, number


def stream_video(path: str | Media, *, size: tuple[int, int]) -> Iterator[NDArray[np.uint8]]:
    """Iterate over all frames of a video, `h w 3`, scaled to a height and width, in little memory.

    Raises:
        ValueError: the file is missing or broken, or has fewer frames than its header says.
    """
    with _open(path) as container:
        info, number = _header(path, container), 0
        for frame in container.decode(video=0):
            yield _upright(frame, size)
            number += 1
    if number < info.frames:
        raise ValueError(
            f"{path}: decoded {number} frames, expected {info.frames}; replace it, or leave it out"
        )


def _upright(frame: av.VideoFrame, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return a frame's pixels, `h w 3`, turned as its display matrix says, and scaled to a height and width."""
    turns = round(frame.rotation / 90)
    if size is not None:
        height, width = size if turns % 2 == 0 else size[::-1]
        frame = frame.reformat(width=width, height=height, format="rgb24")
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _seek(container: InputContainer, start: int) -> int:
    """Move to the last keyframe at or before frame `start`; return the number of the frame there (0: no seeking)."""
    stream = container.streams.video[0]
    packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
    stamps = sorted(pts for pts, _ in packets if pts is not None)
    container.seek(0)
    if len(set(stamps)) < len(packets):  # missing or repeated timestamps say nothing about order
        return 0
    keys = [pts for pts, is_key in packets if is_key and pts is not None and pts <= stamps[start]]
    if not keys or max(keys) == stamps[0]:
        return 0
    container.seek(max(keys), stream=stream)
    landed = next(container.decode(stream), None)
    exact = landed is not None and landed.pts == max(keys)  # not so in a container without an exact index
    container.seek(max(keys) if exact else stamps[0], stream=stream)
    return stamps.index(max(keys)) if exact else 0


def check_length(path: str | Media, info: VideoInfo, *, start: int, frames: int, stride: int) -> None:
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
        rate = Fraction(fps).limit_denominator(1001)
        _encode(partial, pictures, pictures.shape[1:3], rate, lossless=lossless, joinable=joinable)


def cut_video(source: str | Media, target: Path, *, start: int, end: int) -> None:
    """Write frames `start` to `end` (exclusive) of a video as `write_video` does, in little memory.

    Odd sides lose their last row or column.

    Raises:
        ValueError: the source is broken, or ends before `end`.
    """
    info = probe(source)
    size = info.height - info.height % 2, info.width - info.width % 2
    with _open(source) as container, replacing(target) as partial:
        first = _seek(container, start) if start else 0
        decoded = enumerate(container.decode(video=0), first)
        frames = (_upright(frame)[: size[0], : size[1]] for n, frame in decoded if start <= n < end)
        rate = Fraction(info.fps).limit_denominator(1001)
        if _encode(partial, itertools.islice(frames, end - start), size, rate) < end - start:
            raise ValueError(f"{source}: ends before frame {end}; it is truncated or damaged: leave it out")


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


def _encode(
    path: Path,
    pictures: Iterable[NDArray[np.uint8]],
    size: tuple[int, int],
    rate: Fraction,
    *,
    lossless: bool = False,
    joinable: bool = False,
) -> int:
    """Write frames (`h w 3`) of a height and width; return their number."""
    count = 0
    with av.open(str(path), "w", format="mp4", options=_INDEX_FIRST) as container:
        codec, options = ("libx264rgb", {"qp": "0"}) if lossless else ("libx264", _X264)
        options = options | {"bf": "0"} if joinable else options
        stream = cast(VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24" if lossless else "yuv420p"
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
            count += 1
        container.mux(stream.encode(None))
    return count


@contextmanager
def _open(path: str | Media) -> Iterator[InputContainer]:
    media = Path(path) if isinstance(path, str) else path
    if not is_file(media):
        raise ValueError(f"{path}: no such file; check the path")
    try:
        source = str(media) if isinstance(media, Path) else open_media(media)
        with av.open(source, mode="r") as container:
            yield container
    except av.FFmpegError as error:
        if error.errno in NO_ROOM:  # of a video that is written from this one
            raise OSError(error.errno, error.strerror) from error
        raise ValueError(
            f"{path}: not a readable video ({error.strerror}); replace it, or leave it out"
        ) from error


def _header(path: str | Media, container: InputContainer) -> VideoInfo:
    if not container.streams.video:
        raise ValueError(f"{path}: has no video stream; replace it, or leave it out")
    stream = container.streams.video[0]
    if _is_transparent(stream):
        raise ValueError(f"{path}: has an alpha channel; put it on a background, or leave it out")
    size = size_of(Path(path) if isinstance(path, str) else path)
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


def _is_transparent(stream: VideoStream) -> bool:
    """Return True if the pixels have an alpha channel, or a WebM file says that it keeps one beside them."""
    layout = stream.codec_context.format
    planes = layout.components if layout else ()
    return stream.metadata.get("alpha_mode") == "1" or any(plane.is_alpha for plane in planes)
