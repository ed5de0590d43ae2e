"""A candidate for a training triplet: what is known about it grows from stage to stage."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from dit_booth.data.image_files import Box

BROKEN, SHORT, NO_NOUN, NO_MASK = "unreadable", "too short", "no noun", "no mask"
"""Reasons of rejection before the filters; those of the filters are in `filters`."""


class Dropped(ValueError):
    """A candidate is rejected: the reason in a word or two, and the details."""

    def __init__(self, reason: str, details: object) -> None:
        super().__init__(str(details))
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of the manifest. Fields of later stages hold their defaults until then.

    Attributes:
        videoid, page_dir, caption: as in VideoBooth's CSV files; the videoid names one clip.
        video: path within the folder of videos; size: of the file in bytes.
        start, end: frames of the shot in the video, the end exclusive.
        fps, height, width: of the video, upright.
        cut: largest change within the clip, by the measure that finds cuts (`shots.compute_changes`).
        subject: the noun, as it stands in the caption.
        box: of the subject in the clip's first frame, `x0 y0 x1 y1` in pixels; score: the detector's.
        area: share of the frame that the mask covers. sides: sides of the frame that the box touches.
        motion: of the subject against the background, diagonals per second. change: between sampled frames.
        sharpness: steepness of its edges, in percent of its contrast. hash: perceptual, 32 hex digits.
        watermark: correlation with the watermark's edges.
        image_from: videoid of the clip that the image prompt is cut from, if it is another one.
        reasons: why it was rejected, empty for a triplet of the set; details: in a sentence.
    """

    videoid: str
    page_dir: str
    caption: str
    video: str
    size: int = 0
    start: int = 0
    end: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0
    cut: float = 0.0
    subject: str = ""
    box: Box | None = None
    score: float = 0.0
    area: float = 0.0
    sides: int = 0
    motion: float = 0.0
    change: float = 0.0
    sharpness: float = 0.0
    hash: str = ""
    watermark: float = 0.0
    image_from: str = ""
    reasons: tuple[str, ...] = ()
    details: str = ""

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / self.fps if self.fps else 0.0

    @property
    def name(self) -> str:
        """Name for files about this clip and subject."""
        return f"{self.videoid}_{digest(self.subject)[:8]}"

    @property
    def mask_folders(self) -> tuple[str, ...]:
        """Folders of the user that may hold the mask of its first frame: the clip's, and, at its start, the video's."""
        whole = self.videoid.removesuffix(f"_{self.start}-{self.end}")
        return (self.videoid,) if self.start or whole == self.videoid else (self.videoid, whole)

    @classmethod
    def load(cls, row: dict[str, Any]) -> Candidate:
        """Make one of a row of JSON."""
        box = row["box"]
        return cls(**{**row, "reasons": tuple(row["reasons"]), "box": None if box is None else tuple(box)})

    def digest(self) -> str:
        """Return a hash of all fields."""
        return digest(asdict(self))


def digest(value: object) -> str:
    """Return the hash of plain containers, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
