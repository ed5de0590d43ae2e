"""The clips that the page of a data set shows: of one that was built here, or of any that a reader reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dit_booth.data.build.candidate import BROKEN, Candidate
from dit_booth.data.build.measure import measure_frames, sampling
from dit_booth.data.build.segment import touched_sides
from dit_booth.data.build.settings import FilterSettings
from dit_booth.data.build.write import read_manifest
from dit_booth.data.image_files import Mask, read_mask, read_rgb
from dit_booth.data.image_prompt import pixel_box
from dit_booth.data.readers.formats import FormatName
from dit_booth.data.readers.item import Item
from dit_booth.data.readers.triplets import TripletsConfig, scan
from dit_booth.data.video import probe, read_video

PLAYED = 8
"""Frames of a playing clip."""
Clip = Candidate | Item
Drawn = tuple[Candidate, NDArray[np.uint8], Mask | None, float]
"""A measured clip, its frames `f h w 3`, the mask of the first, and the seconds between two frames."""
Draw = Callable[[Any], Drawn]


@dataclass(frozen=True)
class Shown:
    """What a page shows: `draw` reads a clip, `thresholds` are the filters'; `unmeasured` are named only."""

    clips: Sequence[Clip]
    draw: Draw
    unmeasured: Sequence[Candidate]
    accepted: int
    thresholds: Mapping[str, Any]
    built: bool


def built_set(out: Path) -> Shown:
    """Return the measured candidates of a set that `build` made. ValueError: its manifest cannot be read."""
    candidates = read_manifest(out)
    settings = yaml.safe_load((out / "build.yaml").read_text())
    return Shown(
        clips=[c for c in candidates if c.hash],
        draw=partial(read_candidate, videos=settings["videos"], masks=str(out / "build" / "masks")),
        unmeasured=[c for c in candidates if not c.hash],
        accepted=sum(not c.reasons for c in candidates),
        thresholds=settings["filters"],
        built=True,
    )


def read_set(root: Path, format: FormatName) -> Shown:
    """Return the examples of a data set on disk, measured when they are drawn, and the broken ones.

    ValueError: it is no data set of that format, or holds no sound example.
    """
    items, broken = scan(TripletsConfig(root=str(root), format=format, frames=1, max_broken=10**9))
    return Shown(
        clips=items,
        draw=measure_item,
        unmeasured=[
            Candidate(videoid=key, page_dir="", caption="", video="", reasons=(BROKEN,), details=reason)
            for key, reason in broken.items()
        ],
        accepted=len(items),
        thresholds=asdict(FilterSettings()),
        built=False,
    )


def read_candidate(candidate: Candidate, *, videos: str, masks: str) -> Drawn:
    """Read a built clip's frames and mask. ValueError: they cannot be read."""
    length = candidate.end - candidate.start
    count, stride = min(PLAYED, length), max(1, length // PLAYED)
    frames = read_video(Path(videos, candidate.video), start=candidate.start, frames=count, stride=stride)
    _, height, width, _ = frames.shape
    mask = read_mask(Path(masks, f"{candidate.name}.png"), height=height, width=width)
    return candidate, frames, mask, stride / candidate.fps


def bare(item: Item) -> Candidate:
    """Return what is known of an example without its frames."""
    row = item.row
    return Candidate(
        videoid=row.key, page_dir="", caption=row.caption, video=str(row.video), subject=item.subject
    )


def measure_item(item: Item) -> Drawn:
    """Measure an example as `build` measures a clip; without a mask, its box or the whole frame counts as the subject.

    ValueError: it cannot be read.
    """
    row = item.row
    if row.still:
        frames, fps, stride, length = read_rgb(row.video)[None], 1.0, 1, 1
    else:
        info = probe(row.video)
        count, stride = sampling(info.frames)
        frames, fps, length = read_video(row.video, frames=count, stride=stride), info.fps, info.frames
    _, height, width, _ = frames.shape
    mask = item.read_mask(frames[0])
    x0, y0, x1, y1 = pixel_box(item.box, mask, height=height, width=width)
    inside = mask
    if inside is None:
        inside = np.zeros((height, width), bool)
        inside[y0:y1, x0:x1] = True
    candidate = replace(
        bare(item),
        end=length,
        fps=fps,
        height=height,
        width=width,
        box=(x0, y0, x1, y1),
        area=float(inside.mean()),
        sides=touched_sides((x0, y0, x1, y1), height=height, width=width),
    )
    return measure_frames(candidate, frames, inside, stride), frames, mask, stride / fps
