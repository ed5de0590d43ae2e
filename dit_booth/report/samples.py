"""The sample grid: for each of the first prompts its image, its ground truth, and every row's video, as data URIs."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dit_booth.data.video import probe
from dit_booth.evaluation.folder import VideoRow
from dit_booth.report.study import Group, PointResult

PROMPTS = 8
_PICTURE = 512  # largest side of an image prompt; larger ones are scaled down
_TINY = 128  # videos of fewer pixels are enlarged with square pixels


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture or a video; without a `uri`, `missing` says why."""

    uri: str = ""
    video: bool = False
    tiny: bool = False
    shape: str = "1 / 1"
    """Width / height, as CSS has it."""
    missing: str = ""
    style: int = -1


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One prompt: its caption and its cells (image prompt, ground truth, then one for each group)."""

    caption: str
    cells: tuple[Cell, ...]

    @property
    def size(self) -> int:
        """Return the number of characters in the page."""
        return sum(len(cell.uri) for cell in self.cells)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The grid; `dropped` rows did not fit into the page."""

    heads: tuple[str, ...] = ()
    styles: tuple[int, ...] = ()
    rows: tuple[SampleRow, ...] = ()
    seeds: tuple[int, ...] = ()
    """Seed of each group's videos; the lowest common one if there is one."""
    dropped: int = 0
    unreadable: tuple[str, ...] = field(default_factory=tuple)


def read_samples(groups: Sequence[Group], styles: dict[str, int], budget: int) -> Samples:
    """Read the grid of the groups' first prompts, at most `budget` characters."""
    shown = [group for group in groups if any(point.samples.own_videos for point in group.finished)]
    if not shown:
        return Samples()
    points = [_point(group, _common_seed(shown)) for group in shown]
    videos = [{video.prompt: video for video in point.samples.own_videos} for point in points]
    having = Counter(prompt for own in videos for prompt in own)
    rows: list[SampleRow] = []
    wanted = sorted(having, key=lambda prompt: -having[prompt])[:PROMPTS]  # those of most groups first
    for prompt in wanted:
        row = _row([own.get(prompt) for own in videos], points, [styles[group.id] for group in shown])
        if sum(r.size for r in rows) + row.size > budget:
            break
        rows.append(row)
    given = any(cell.uri for row in rows for cell in row.cells[:2])  # older runs have not saved them
    return Samples(
        heads=("image prompt", "ground truth", *(group.label for group in shown))[0 if given else 2 :],
        styles=(-1, -1, *(styles[group.id] for group in shown))[0 if given else 2 :],
        rows=tuple(rows if given else (replace(row, cells=row.cells[2:]) for row in rows)),
        seeds=tuple(point.seed for point in points),
        dropped=len(wanted) - len(rows),
        unreadable=tuple(cell.missing for row in rows for cell in row.cells if ": " in cell.missing),
    )


def _common_seed(groups: Sequence[Group]) -> int | None:
    common = set.intersection(*({point.seed for point in group.finished} for group in groups))
    return min(common, default=None)


def _point(group: Group, seed: int | None) -> PointResult:
    sampled = [point for point in group.finished if point.samples.own_videos]
    return next((point for point in sampled if point.seed == seed), sampled[0])


def _row(
    videos: Sequence[VideoRow | None], points: Sequence[PointResult], styles: Sequence[int]
) -> SampleRow:
    """Return a prompt's row; image prompt and ground truth are the same in all points, so any point's are taken."""
    found = [(p.samples.folder, v) for p, v in zip(points, videos, strict=True) if v is not None]
    cells = [
        video_cell([point.samples.folder / video.video] if video else [], style)
        for point, video, style in zip(points, videos, styles, strict=True)
    ]
    image = picture_cell([folder / video.image for folder, video in found if video.image])
    truth = video_cell([folder / video.truth for folder, video in found if video.truth], -1)
    return SampleRow(caption=found[0][1].caption or found[0][1].prompt, cells=(image, truth, *cells))


def picture_cell(files: Sequence[Path]) -> Cell:
    """Return the first of the files that exists as PNG, at most 512 pixels large, or a cell that says why not."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return Cell(missing="not saved")
    try:
        with Image.open(file) as picture:
            data, width = file.read_bytes(), picture.width
            if picture.format != "PNG" or max(picture.size) > _PICTURE:
                picture.thumbnail((_PICTURE, _PICTURE))
                out = io.BytesIO()
                picture.convert("RGB").save(out, format="PNG")
                data = out.getvalue()
    except OSError as error:  # one unreadable picture must not prevent the page
        return Cell(missing=f"{file}: {error}")
    return Cell(uri=_uri(data, "image/png"), tiny=width < _TINY)


def video_cell(files: Sequence[Path], style: int) -> Cell:
    """Return the first of the files that exists, or a cell that says why there is none."""
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return Cell(missing="not saved", style=style)
    try:
        info = probe(file)
    except ValueError as error:  # one unreadable video must not prevent the page
        return Cell(missing=str(error), style=style)
    return Cell(
        uri=_uri(file.read_bytes(), "video/mp4"),
        video=True,
        tiny=info.width < _TINY,
        shape=f"{info.width} / {info.height}",
        style=style,
    )


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
