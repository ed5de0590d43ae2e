"""Read the list of videos with their captions."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dit_booth.data.build.candidate import BROKEN, Candidate
from dit_booth.files import within


def read_captions(file: Path, videos: Path) -> list[Candidate]:
    """Return a candidate for each line of a CSV file; lines that cannot be used are rejected ones.

    The columns are `video,caption`, the path within `videos`, or VideoBooth's and WebVid's `videoid,page_dir,name`.
    A column `subject` names the subject, and further columns are not read. The file may have a byte-order mark.

    Raises:
        ValueError: the file cannot be read, or has neither set of columns.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            reader = csv.DictReader(stream, restkey="", restval="")
            columns = list(reader.fieldnames or ())
            rows = [(reader.line_num, {k: str(v) for k, v in row.items()}) for row in reader]
    except (OSError, csv.Error) as error:
        raise ValueError(f"captions {file} cannot be read ({error}); give a CSV file") from error
    by_path = {"video", "caption"} <= set(columns)
    if not by_path and not {"videoid", "page_dir", "name"} <= set(columns):
        raise ValueError(
            f"{file}: has the columns {', '.join(columns) or 'none'}; it needs video,caption or videoid,page_dir,name"
        )
    seen: set[str] = set()
    out = []
    for number, row in rows:
        candidate = parse_path(row) if by_path else parse_webvid(row)
        problem = check(candidate, row, videos, seen)
        seen.add(candidate.videoid)
        if problem:
            details = f"{file.name}, line {number}: {problem}"
            out.append(replace(candidate, reasons=(BROKEN,), details=details))
        else:
            out.append(replace(candidate, size=(videos / candidate.video).stat().st_size))
    return out


def parse_path(row: Mapping[str, str]) -> Candidate:
    """Make a candidate of the columns video,caption."""
    path = Path(row["video"])
    return Candidate(
        videoid=re.sub(r"[^\w.-]+", "_", str(path.with_suffix(""))),
        page_dir="clips",
        caption=row["caption"].strip(),
        video=str(path),
        subject=row.get("subject", "").strip(),
    )


def parse_webvid(row: Mapping[str, str]) -> Candidate:
    """Make a candidate of the columns videoid,page_dir,name."""
    return Candidate(
        videoid=row["videoid"],
        page_dir=row["page_dir"],
        caption=row["name"].strip(),
        video=str(Path(row["page_dir"], f"{row['videoid']}.mp4")),
        subject=row.get("subject", "").strip(),
    )


def check(candidate: Candidate, row: Mapping[str, str], videos: Path, seen: set[str]) -> str:
    """Return the reason why a line cannot be used; empty: it can."""
    if "\ufffd" in "".join(row.values()):
        return "is not UTF-8"
    if not candidate.caption:
        return "has no caption"
    if candidate.videoid in seen:
        return f"{candidate.videoid!r} stands twice"
    try:
        within("--videos", videos, Path(candidate.video))
        within("--out", videos, Path(candidate.page_dir, candidate.videoid))
    except ValueError as error:
        return str(error)
    if "/" in candidate.videoid or not re.search(r"[^.]", candidate.videoid):
        return f"videoid {candidate.videoid!r} is no name of a file"
    if not (videos / candidate.video).is_file():
        return f"{candidate.video}: no such file"
    return ""
