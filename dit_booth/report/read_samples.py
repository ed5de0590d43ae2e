"""Read a folder of sampled videos: scores, the list of videos, and what could not be scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dit_booth.evaluation.folder import LEFT_OUT, VIDEOS, read_rows
from dit_booth.evaluation.scores import SCORES, Score, read_scores
from dit_booth.report.study import Measured, SampledVideo, SampleFolder


def read_sample_folder(folder: Path) -> SampleFolder:
    """Read what there is. ValueError: a file is malformed; the message names it and the line."""
    return SampleFolder(
        folder=folder,
        measured=_measured(folder / SCORES),
        videos=tuple(_videos(folder / VIDEOS)),
        left_out=_left_out(folder / LEFT_OUT),
    )


def _measured(file: Path) -> Measured:
    if not file.is_file():
        return {}
    found: dict[tuple[str, str], dict[str, list[Score]]] = {}
    for score in read_scores(file):
        found.setdefault((score.control, score.metric), {}).setdefault(score.prompt, []).append(score)
    return {key: {p: tuple(same) for p, same in prompts.items()} for key, prompts in found.items()}


def _videos(file: Path) -> Iterator[SampledVideo]:
    """Iterate over the list of videos, whose paths stay in the folder: a page has copies of the files."""
    for row in read_rows(file) if file.is_file() else ():
        yield SampledVideo(
            file=row.video,
            prompt=row.prompt or f"{row.image}: {row.caption}",  # as the evaluation names it
            caption=row.caption,
            image=row.image,
            truth=row.truth,
            noise_seed=int(row.noise_seed),
            control=row.control,
        )


def _left_out(file: Path) -> dict[str, str]:
    try:
        reasons = json.loads(file.read_text()) if file.is_file() else {}
        return {str(video): str(reason) for video, reason in reasons.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{file}: no object of videos and reasons ({error}); score the videos again"
        ) from error
