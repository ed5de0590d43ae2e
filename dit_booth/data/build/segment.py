"""Find the subject in a clip's first frame: a mask and its box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np

from dit_booth.data.build.candidate import NO_MASK, Candidate, Dropped
from dit_booth.data.build.nouns import singulars
from dit_booth.data.build.settings import SegmentSettings
from dit_booth.data.image_files import Box, Mask, MaskEntry, Pixels, read_entries, read_mask
from dit_booth.data.image_prompt import pixel_box
from dit_booth.data.video import read_video
from dit_booth.files import replacing, within

GRABCUT_SIDE, GRABCUT_STEPS = 480, 5
"""Pixels of the longer side at which GrabCut works, and its iterations."""


class Found(NamedTuple):
    """A subject's mask (`h w`), its box, and the detector's score."""

    mask: Mask
    box: Box
    score: float


class Segmenter(Protocol):
    """Finds a subject, named by a noun, in the first frame of a clip; None: it is not there."""

    def __call__(self, frame: Pixels, noun: str, folders: Sequence[str]) -> Found | None: ...


def find_mask(candidate: Candidate, *, videos: str, masks: str, settings: SegmentSettings) -> list[Candidate]:
    """Find the subject's mask in the clip's first frame, write it into `masks`, and note its box and size.

    Raises:
        Dropped: there is none.
        ValueError: the frame or the user's mask cannot be read.
    """
    (frame,) = read_video(Path(videos, candidate.video), start=candidate.start, frames=1)
    found = make_segmenter(settings)(frame, candidate.subject, candidate.mask_folders)
    if found is None or not found.mask.any():
        raise Dropped(NO_MASK, f"{settings.by} finds no {candidate.subject!r} in frame {candidate.start}")
    write_mask(Path(masks, f"{candidate.name}.png"), found.mask)
    height, width = found.mask.shape
    x0, y0, x1, y1 = pixel_box(found.box, found.mask, height=height, width=width)
    sides = touched_sides((x0, y0, x1, y1), height=height, width=width)
    area = float(found.mask.mean())
    return [replace(candidate, box=(x0, y0, x1, y1), score=found.score, area=area, sides=sides)]


def touched_sides(box: Box, *, height: int, width: int) -> int:
    """Return the number of sides of the frame that a box touches, within a pixel and half a percent."""
    edge = 1 + round(0.005 * max(height, width))
    x0, y0, x1, y1 = box
    return sum((x0 < edge, y0 < edge, x1 > width - edge, y1 > height - edge))


def write_mask(file: Path, mask: Mask) -> None:
    """Write a mask as a PNG file of one channel, 0 and 255."""
    written, data = cv2.imencode(".png", mask.astype(np.uint8) * 255)
    assert written
    with replacing(file) as partial:
        partial.write_bytes(data.tobytes())


@cache
def make_segmenter(settings: SegmentSettings) -> Segmenter:
    """Build a segmenter, once in each process."""
    if settings.by == "grounded-sam":
        from dit_booth.data.build.grounded import GroundedSam

        return GroundedSam(settings)
    folder = Path(settings.folder)
    return UserMasks(folder) if settings.by == "masks" else GrabCut(folder)


class UserMasks:
    """The user's masks: ``<videoid>/mask.json`` and ``<videoid>/mask_<value>.png``, as in VideoBooth's data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, frame: Pixels, noun: str, folders: Sequence[str]) -> Found | None:
        found = find_entry(self.folder, folders, noun)
        if found is None:
            return None
        folder, entry = found
        height, width, _ = frame.shape
        file = within(
            "segment.folder", self.folder, (folder / f"mask_{entry.value}.png").relative_to(self.folder)
        )
        return Found(read_mask(file, height=height, width=width), entry.box, entry.logit)


class GrabCut:
    """OpenCV's GrabCut (Rother et al. 2004), which separates the colours in a box from those around it.

    The boxes are the user's, in ``<videoid>/mask.json``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, frame: Pixels, noun: str, folders: Sequence[str]) -> Found | None:
        found = find_entry(self.folder, folders, noun)
        if found is None:
            return None
        _, entry = found
        height, width, _ = frame.shape
        x0, y0, x1, y1 = pixel_box(entry.box, None, height=height, width=width)
        scale = min(1.0, GRABCUT_SIDE / max(height, width))
        small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        left, top = int(scale * x0), int(scale * y0)
        # GrabCut needs background: a row and column of the frame stay outside of a box that fills it.
        right, bottom = min(round(scale * x1), small.shape[1] - 1), min(round(scale * y1), small.shape[0] - 1)
        labels = np.zeros(small.shape[:2], np.uint8)
        box = (left, top, max(1, right - left), max(1, bottom - top))
        cv2.setRNGSeed(0)
        bgr = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
        work = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(bgr, labels, box, *work, GRABCUT_STEPS, cv2.GC_INIT_WITH_RECT)
        inside = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
        mask = cv2.resize(inside, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
        return Found(mask, entry.box, entry.logit) if mask.any() else None


def find_entry(root: Path, folders: Sequence[str], noun: str) -> tuple[Path, MaskEntry] | None:
    """Return the first folder with a ``mask.json``, and its entry whose label is the noun in either number.

    Returns:
        None: no folder has one, or it has no such label.

    Raises:
        ValueError: the file is malformed, or lies outside the root.
    """
    for name in folders:
        file = within("segment.folder", root, Path(name, "mask.json"))
        if file.is_file():
            forms = singulars(noun.lower())
            entries = [entry for entry in read_entries(file) if singulars(entry.label.lower()) & forms]
            best = max(entries, key=lambda entry: entry.logit, default=None)
            return None if best is None else (file.parent, best)
    return None
