"""The build: from a folder of videos and a list of captions to a data set in VideoBooth's format."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import yaml

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.captions import read_captions
from dit_booth.data.build.filters import decide
from dit_booth.data.build.measure import measure
from dit_booth.data.build.nouns import find_nouns
from dit_booth.data.build.segment import find_mask
from dit_booth.data.build.settings import BuildSettings
from dit_booth.data.build.shots import find_shots
from dit_booth.data.build.stages import run_stage
from dit_booth.data.build.write import pair_across, write_clip, write_set
from dit_booth.data.video import decoder
from dit_booth.files import write_text


@dataclass(frozen=True)
class Report:
    """The result of a build: every candidate, with the reasons of those that were rejected."""

    candidates: Sequence[Candidate]

    @property
    def accepted(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if not candidate.reasons]

    def lines(self) -> Iterator[str]:
        """Iterate over a table of what was dropped and why; a candidate with several reasons counts for each."""
        counts = Counter(reason for candidate in self.candidates for reason in candidate.reasons)
        first = {reason: c for c in reversed(self.candidates) for reason in c.reasons}
        yield f"{len(self.accepted)} triplets of {len(self.candidates)} candidates"
        for reason, count in counts.most_common():
            candidate = first[reason]
            example = f"{candidate.videoid} {candidate.subject}".strip()
            yield f"  {reason:12} {count:6}  such as {example}{f': {d}' if (d := candidate.details) else ''}"


def build(settings: BuildSettings) -> Report:
    """Build a data set, or go on with one that was stopped.

    Each stage keeps its results in ``<out>/build``, by a hash of its input and settings.

    Raises:
        ValueError: the folder of videos or the list of captions cannot be used, or no candidate is left.
    """
    videos, out = Path(settings.videos), Path(settings.out)
    if not videos.is_dir():
        raise ValueError(
            f"videos is {settings.videos!r}, which is not a folder; give the folder of the videos"
        )
    if Path(settings.captions).resolve().parent == out.resolve():
        raise ValueError(
            f"captions is {settings.captions!r}, which lies in out, where every CSV file is a list of the set; move it"
        )
    folder, masks = out / "build", out / "build" / "masks"
    run = partial(run_stage, folder=folder, workers=settings.workers or os.cpu_count() or 1)
    source, frames = str(videos), settings.filters.min_frames

    candidates = read_captions(Path(settings.captions), videos)
    shots = partial(find_shots, videos=source, settings=settings.shots, min_frames=frames)
    candidates = run("shots", candidates, shots, settings=[decoder(), asdict(settings.shots), frames])
    nouns = partial(find_nouns, settings=settings.nouns)
    candidates = run("nouns", candidates, nouns, settings=asdict(settings.nouns))
    segments = partial(find_mask, videos=source, masks=str(masks), settings=settings.segment)
    candidates = run("masks", candidates, segments, settings=[decoder(), asdict(settings.segment)])
    measures = partial(measure, videos=source, masks=str(masks), watermark=settings.filters.watermark)
    candidates = run("measures", candidates, measures, settings=[decoder(), settings.filters.watermark])
    candidates = decide(candidates, settings)
    candidates = pair_across(candidates) if settings.cross_pair else candidates
    clips = partial(write_clip, videos=source, out=str(out))
    candidates = run("clips", candidates, clips, settings=asdict(settings))
    write_set(candidates, masks=masks, out=out)
    write_text(out / "build.yaml", yaml.safe_dump(asdict(settings), sort_keys=False))
    report = Report(candidates)
    write_text(out / "report.txt", "".join(f"{line}\n" for line in report.lines()))
    return report
