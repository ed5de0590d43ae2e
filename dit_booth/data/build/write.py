"""Write the data set: clips, masks and CSV files in VideoBooth's format, and the manifest of all candidates."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.nouns import singulars
from dit_booth.data.parquet import read_parquet, write_parquet
from dit_booth.data.video import cut_video
from dit_booth.files import replacing, write_text

MANIFEST = "manifest.parquet"
COLUMNS = ("videoid", "page_dir", "name", "image_from")


def write_clip(candidate: Candidate, *, videos: str, out: str) -> list[Candidate]:
    """Write a clip, unless it is there: a whole .mp4 file as a link or copy, a shot encoded anew.

    Raises:
        ValueError: it cannot be read.
    """
    source = Path(videos, candidate.video).resolve()
    target = Path(out, "videos", candidate.page_dir, f"{candidate.videoid}.mp4")
    if target.is_file() and target.stat().st_mtime >= source.stat().st_mtime:
        return [candidate]
    if candidate.mask_folders == (candidate.videoid,) and not candidate.start and source.suffix == ".mp4":
        with replacing(target) as partial:
            try:
                os.link(source, partial)
            except OSError:  # another disk
                shutil.copy2(source, partial)
    else:
        cut_video(source, target, start=candidate.start, end=candidate.end)
    return [candidate]


def write_masks(clip: Sequence[Candidate], masks: Path, folder: Path) -> None:
    """Write ``mask.json`` and ``mask_<value>.png`` of one clip's subjects."""
    entries: list[dict[str, object]] = [{"value": 0, "label": "background"}]
    for value, candidate in enumerate(clip, 1):
        with replacing(folder / f"mask_{value}.png") as partial:
            shutil.copyfile(masks / f"{candidate.name}.png", partial)
        label = {"label": candidate.subject, "logit": candidate.score, "box": candidate.box}
        entries.append({"value": value, **label})
    write_text(folder / "mask.json", json.dumps(entries))


def write_set(candidates: Sequence[Candidate], *, masks: Path, out: Path) -> None:
    """Write the masks and the CSV files of the triplets, and the manifest of all candidates.

    A clip stands in the CSV file of its subject of the highest score. CSV files of earlier builds are removed:
    those that begin with `COLUMNS`.
    """
    groups = defaultdict(list)
    accepted = sorted((c for c in candidates if not c.reasons), key=lambda c: c.videoid)
    for videoid, of_clip in groupby(accepted, key=lambda c: c.videoid):
        clip = list(of_clip)
        write_masks(clip, masks, out / "masks" / videoid)
        best = max(clip, key=lambda c: c.score)
        groups[group_of(best.subject)].append(best)
    for file in out.glob("*.csv"):
        if file.read_bytes().startswith(",".join(COLUMNS).encode()):
            file.unlink()
    for name, clips in groups.items():
        with replacing(out / f"{name}.csv") as partial, partial.open("w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(COLUMNS)
            table.writerows((c.videoid, c.page_dir, c.caption, c.image_from) for c in clips)
    write_manifest(candidates, out)


def group_of(subject: str) -> str:
    """Return the name of a subject's CSV file: its shortest singular form."""
    forms = [form for form in singulars(subject.lower()) if form]
    return re.sub(r"[^\w-]+", "_", subject.lower() if subject.lower().endswith("ss") else min(forms, key=len))


def write_manifest(candidates: Sequence[Candidate], out: Path) -> None:
    """Write a row for every candidate into ``manifest.parquet``.

    ValueError: DuckDB is not installed. OSError: the file cannot be written.
    """
    rows = out / "build" / "manifest.jsonl"
    lines = (json.dumps({**asdict(c), "seconds": c.seconds, "accepted": not c.reasons}) for c in candidates)
    write_text(rows, "".join(f"{line}\n" for line in lines))
    write_parquet(rows, out / MANIFEST, COLUMN_TYPES)
    rows.unlink()


COLUMN_TYPES = {
    **dict.fromkeys(("videoid", "page_dir", "caption", "video", "subject", "hash", "image_from"), "VARCHAR"),
    **dict.fromkeys(("size", "start", "end", "height", "width", "sides"), "BIGINT"),
    **dict.fromkeys(("fps", "seconds", "cut", "score", "area"), "DOUBLE"),
    **dict.fromkeys(("motion", "change", "sharpness", "watermark"), "DOUBLE"),
    "box": "DOUBLE[]",
    "accepted": "BOOLEAN",
    "reasons": "VARCHAR[]",
    "details": "VARCHAR",
}


def read_manifest(out: Path) -> list[Candidate]:
    """Read the rows of ``manifest.parquet``. ValueError: there is none, it is broken, or DuckDB is not installed."""
    file = out / MANIFEST
    if not file.is_file():
        raise ValueError(f"{out} has no {MANIFEST}; build it with dit-booth data build")
    return [
        Candidate.load({k: v for k, v in row.items() if k not in ("seconds", "accepted")})
        for row in read_parquet(file)
    ]


def pair_across(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Give each triplet the image prompt of the next shot of the same video and subject, in a circle, if there is one.

    This is cross-pair training (OpenS2V, arXiv 2505.20292; Phantom-Data, arXiv 2506.18851), as far as a video itself
    shows a subject twice.
    """
    accepted = [c for c in candidates if not c.reasons]
    shots = defaultdict(list)
    for candidate in accepted:
        shots[candidate.video, candidate.subject.lower()].append(candidate.videoid)
    following = {
        (clips[i], subject): clips[(i + 1) % len(clips)]
        for (_, subject), clips in shots.items()
        for i in range(len(clips))
        if len(clips) > 1
    }
    return [
        c if c.reasons else replace(c, image_from=following.get((c.videoid, c.subject.lower()), ""))
        for c in candidates
    ]
