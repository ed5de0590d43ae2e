"""Read a folder of sampled videos: scores, the list of videos, and what could not be scored."""

from __future__ import annotations

import json
from pathlib import Path

from dit_booth.evaluation.folder import LEFT_OUT, VIDEOS, read_rows
from dit_booth.evaluation.scores import SCORES, Score, read_scores
from dit_booth.report.study import Measured, SampleFolder


def read_sample_folder(folder: Path) -> SampleFolder:
    """Read what there is. ValueError: a file is malformed; the message names it and the line."""
    videos = folder / VIDEOS
    return SampleFolder(
        folder=folder,
        measured=_measured(folder / SCORES),
        videos=tuple(read_rows(videos)) if videos.is_file() else (),
        left_out=_left_out(folder / LEFT_OUT),
    )


def _measured(file: Path) -> Measured:
    if not file.is_file():
        return {}
    found: dict[tuple[str, str], dict[str, list[Score]]] = {}
    for score in read_scores(file):
        found.setdefault((score.control, score.metric), {}).setdefault(score.prompt, []).append(score)
    return {key: {p: tuple(same) for p, same in prompts.items()} for key, prompts in found.items()}


def _left_out(file: Path) -> dict[str, str]:
    try:
        reasons = json.loads(file.read_text()) if file.is_file() else {}
        return {str(video): str(reason) for video, reason in reasons.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no object of videos and reasons ({error}); score the videos again"
        ) from error
