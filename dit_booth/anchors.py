"""Anchors of the image: the frames of a video that it reaches, and its rotary place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from dit_booth.inject import QKV, Latents, Place, Site, Tap

At = Literal["first", "keyframes", "all"]


class ReferenceAt(NamedTuple):
    """Frames that the image reaches, by their indices in the whole video: frame 0, every `every`-th one, or all."""

    frames: At = "all"
    every: int = 1

    def reaches(self, frame: int) -> bool:
        """Return True if the image reaches a frame of the video."""
        return self.frames == "all" or frame == 0 or (self.frames == "keyframes" and frame % self.every == 0)


EVERY_FRAME = ReferenceAt()


def check_place(field: str, place: Place, sites: Sequence[Site]) -> None:
    """Raise ValueError if attentions lack the rotary positions that a reference's place, an option `field`, needs."""
    if place != "backbone" and not all(site.rotary for site in sites):
        raise ValueError(
            f"{field} is {place}, and the backbone has no rotary positions; set its positions to rotary, or {field} to"
            " backbone"
        )


@dataclass(frozen=True)
class TapAtFrames:
    """A tap that gets payloads whose `readers` are the frames that the image reaches.

    frames: the video's indices of the pass's frames; none: all of the payload, from 0.
    """

    tap: Tap
    at: ReferenceAt
    frames: Sequence[int] | None

    def __call__(self, payload: Any, image: object) -> Any:
        if image is None or not isinstance(payload, (QKV, Latents)):
            return self.tap(payload, image)
        count = payload.q.shape[1] if isinstance(payload, QKV) else payload.x.shape[1] - payload.context
        frames = range(count) if self.frames is None else self.frames
        assert count >= len(frames), "reference_at is for attentions in which every frame is a group"
        context = (False,) * (count - len(frames))  # frames before the video, which are no keyframes
        readers = context + tuple(self.at.reaches(frame) for frame in frames)
        return replace(self.tap(replace(payload, readers=readers), image), readers=None)
