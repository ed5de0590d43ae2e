"""Small videos with unusual properties, written with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def ramp(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """`f h w 3` uint8: each frame has its own grey level, and a bright left edge."""
    pictures = np.zeros((frames, height, width, 3), np.uint8)
    pictures += (16 + 5 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    pictures[:, :, :8] = 250
    return pictures


def write(
    path: Path,
    pictures: np.ndarray,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    stamps: list[int] | None = None,
    rotation: int = 0,
) -> Path:
    """Write frames (`f h w 3`) at 10 frames per second, or at given milliseconds; return the path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], pixels
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = stamps[number] if stamps else 100 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def write_no_frames(path: Path) -> Path:
    """Write a file with a video stream and no frame in it."""
    with av.open(str(path), "w", options={"movflags": "empty_moov+frag_keyframe"}) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        container.start_encoding()
    return path
