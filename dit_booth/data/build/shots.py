"""Cut a video into shots, by the change of colour from frame to frame, or by a network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dit_booth.data.build.candidate import SHORT, Candidate, Dropped
from dit_booth.data.build.settings import ShotSettings
from dit_booth.data.video import VideoInfo, probe, stream_video

SIDE = 64  # pixels of the longer side at which frames are compared


def find_shots(
    candidate: Candidate, *, videos: str, settings: ShotSettings, min_frames: int
) -> list[Candidate]:
    """Return a candidate for each shot of a video that is long enough.

    Raises:
        ValueError: the video cannot be read.
        Dropped: no shot has `min_frames` frames.
    """
    path = Path(videos, candidate.video)
    info = probe(path)
    changes = compute_changes(path, info, settings)
    if len(changes) != info.frames - 1:
        raise ValueError(f"{path}: decoded {len(changes) + 1} frames, expected {info.frames}")
    cuts = [int(i) + 1 for i in np.flatnonzero(changes >= settings.threshold)] if settings.split else []
    edges = [0, *cuts, info.frames]
    shots = [
        replace(
            candidate,
            videoid=candidate.videoid if len(edges) == 2 else f"{candidate.videoid}_{start}-{end}",
            start=start,
            end=end,
            fps=info.fps,
            height=info.height,
            width=info.width,
            cut=float(changes[start : end - 1].max(initial=0.0)),
        )
        for start, end in pairwise(edges)
    ]
    long = [shot for shot in shots if shot.end - shot.start >= min_frames]
    if not long:
        lengths = ", ".join(str(shot.end - shot.start) for shot in shots[:8])
        raise Dropped(SHORT, f"its shots have {lengths} frames; filters.min_frames is {min_frames}")
    return long


def compute_changes(path: Path, info: VideoInfo, settings: ShotSettings) -> NDArray[np.float64]:
    """Return the change from each frame to the next, by the measure that finds cuts, `f - 1`."""
    if settings.by == "transnet":
        from dit_booth.data.build import transnet

        return transnet.change(stream_video(path, size=transnet.SIZE))
    scale = SIDE / max(info.height, info.width)
    size = max(2, round(info.height * scale)), max(2, round(info.width * scale))
    if settings.by == "adaptive":
        from dit_booth.data.build import adaptive

        return adaptive.change(stream_video(path, size=size))
    return change(stream_video(path, size=size))


def change(frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Return the mean absolute difference of hue, saturation and value of consecutive frames, `f - 1`.

    This is the content value of PySceneDetect's ContentDetector with equal weights, on small frames.
    """
    hsv = (cv2.cvtColor(frame, cv2.COLOR_RGB2HSV).astype(np.int16) for frame in frames)
    return np.array([np.abs(after - before).mean() for before, after in pairwise(hsv)])
