"""Precision and recall of every filter of `dit-booth data build` on synthetic clips with planted defects.

    python experiments/bench/data_filters.py [--clips 500] [--out FOLDER]

Half of the clips are sound, the others have one planted defect each, in turn. The masks are the true ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from dit_booth.data.build import BuildSettings, FilterSettings, build
from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.settings import SegmentSettings, ShotSettings
from dit_booth.testing.clips import DEFECTS, Defect, write_clips

FRAMES, SIZE, FPS = 24, (240, 320), 12.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, default=500)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        plan = plant(arguments.clips)
        write_clips(plan, out, frames=FRAMES, size=SIZE, fps=FPS, workers=arguments.workers)
        begin = time.perf_counter()
        report = build(settings_of(out, frames=FRAMES, workers=arguments.workers))
        seconds = time.perf_counter() - begin
        print("\n".join(report.lines()))
        print(
            f"{len(plan)} clips, {SIZE[1]} x {SIZE[0]}, {FRAMES} frames: {seconds / len(plan):.2f} s a clip"
        )
        for name, precision, recall, count in figures(plan, report.candidates):
            print(f"  {name:12} planted {count:4}  precision {precision:.3f}  recall {recall:.3f}")


def plant(count: int) -> list[Defect]:
    """Return the defects of clips: every other one is sound."""
    planted = DEFECTS[1:]
    return [planted[i // 2 % len(planted)] if i % 2 else "none" for i in range(count)]


def settings_of(root: Path, *, frames: int, workers: int) -> BuildSettings:
    """Return the default settings, but for the clips' length and the watermark; videos with cuts are rejected whole."""
    return BuildSettings(
        videos=str(root / "videos"),
        captions=str(root / "captions.csv"),
        out=str(root / "set"),
        workers=workers,
        shots=ShotSettings(split=False),
        segment=SegmentSettings(by="masks", folder=str(root / "masks")),
        filters=FilterSettings(min_frames=frames * 3 // 4, watermark=str(root / "watermark.png")),
    )


def figures(plan: Sequence[Defect], candidates: Sequence[Candidate]) -> list[tuple[str, float, float, int]]:
    """Return name, precision, recall and number of plants of each filter.

    Precision is over the sound clips and those with the filter's own plant: a clip with another plant may well have
    this defect too, as a large subject touches the border. The caption's "ground" has no mask in any clip.
    """
    reasons = {c.videoid: c.reasons for c in candidates if c.subject != "ground"}
    out: list[tuple[str, float, float, int]] = []
    for name in DEFECTS[1:]:
        planted = {f"clip{i}" for i, defect in enumerate(plan) if defect == name}
        sound = {f"clip{i}" for i, defect in enumerate(plan) if defect == "none"}
        found = {clip for clip in planted | sound if name in reasons[clip]}
        both = len(planted & found)
        out.append((name, both / max(1, len(found)), both / max(1, len(planted)), len(planted)))
    return out


if __name__ == "__main__":
    main()
