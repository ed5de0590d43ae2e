"""Cuts by PySceneDetect's AdaptiveDetector: changes of colour that stand out from those of the frames around."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
from numpy.typing import NDArray


def change(frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Return the change from each frame to the next in relation to the mean of two before it and two after it, `f - 1`.

    It is 0 where the change itself is below the detector's lowest (15 of 255), and at either end, where too few are
    around it. frames: `h w 3`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode, StatsManager
    except ImportError as error:
        raise ValueError(
            "shots.by is adaptive, and scenedetect-headless is not installed; pip install dit-booth[shots], or use"
            " shots.by=content"
        ) from error
    detector, stats = AdaptiveDetector(min_scene_len=0), StatsManager()
    metrics = detector.get_metrics()
    ratio, content = metrics[-1], detector.FRAME_SCORE_KEY
    stats.register_metrics(metrics)
    detector.stats_manager = stats
    times = []
    for number, frame in enumerate(frames):
        times.append(FrameTimecode(number, 25.0))  # frames are told apart by their number alone
        detector.process_frame(times[-1], cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    known = [stats.get_metrics(time, [ratio, content]) for time in times[1:]]
    return np.array([r if r and c >= detector.min_content_val else 0.0 for r, c in known])
