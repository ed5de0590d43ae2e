"""Decide which candidates become triplets, from what was measured; cheap, so thresholds can be tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.settings import BuildSettings

Rejects = Callable[[Candidate, BuildSettings], bool]

FILTERS: dict[str, Rejects] = {
    "small": lambda c, s: c.area < s.filters.min_area,
    "large": lambda c, s: c.area > s.filters.max_area,
    "border": lambda c, s: c.sides > s.filters.max_sides,
    "still": lambda c, s: c.change < s.filters.min_change,
    "no motion": lambda c, s: s.filters.min_change <= c.change and c.motion < s.filters.min_motion,
    "cut": lambda c, s: c.cut >= s.shots.threshold,
    "blurred": lambda c, s: c.sharpness < s.filters.min_sharpness,
    "watermark": lambda c, s: bool(s.filters.watermark) and c.watermark > s.filters.max_watermark,
}
"""Reasons of rejection of a single clip. A still has no motion either, and is only called a still."""
DUPLICATE = "duplicate"


def decide(candidates: Sequence[Candidate], settings: BuildSettings) -> list[Candidate]:
    """Give each measured candidate its reasons of rejection; of duplicates, the first stays."""
    out = []
    for candidate in candidates:
        reasons = tuple(name for name, rejects in FILTERS.items() if rejects(candidate, settings))
        out.append(candidate if candidate.reasons else replace(candidate, reasons=reasons))
    return mark_duplicates(out, settings.filters.max_distance) if settings.filters.max_distance >= 0 else out


def mark_duplicates(candidates: Sequence[Candidate], distance: int) -> list[Candidate]:
    """Reject clips whose hash is within `distance` bits of an earlier one's that stays, of another clip.

    Two hashes of 128 bits that differ in at most d bits share at least one of d + 1 bands, so only clips that share a
    band are compared.
    """
    edges = [round(128 * i / (distance + 1)) for i in range(distance + 2)]
    bands: dict[tuple[int, int], list[tuple[int, str]]] = defaultdict(list)
    out = []
    for candidate in candidates:
        if candidate.reasons:
            out.append(candidate)
            continue
        value = int(candidate.hash, 16)
        keys = [
            (i, (value >> low) & ((1 << (high - low)) - 1)) for i, (low, high) in enumerate(pairwise(edges))
        ]
        twin = next(
            (
                clip
                for key in keys
                for other, clip in bands[key]
                if clip != candidate.videoid and (other ^ value).bit_count() <= distance
            ),
            None,
        )
        if twin is not None:
            out.append(replace(candidate, reasons=(DUPLICATE,), details=f"looks like {twin}"))
            continue
        for key in keys:
            bands[key].append((value, candidate.videoid))
        out.append(candidate)
    return out
