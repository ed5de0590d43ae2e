"""Frame plans: for every query frame, the key frames that it reads."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from dit_booth.attention.tracing import constant

Frames = tuple[tuple[int, ...], ...]
"""Visibility of a segment: ``frames[i]`` are the groups that query frame ``i`` reads, sorted, without repeats."""

UNLIMITED_FRAMES = 1 << 30
"""More frames than any video has."""

Term = Callable[[int, int, int], range | set[int]]
"""A term of the plan language: query frame i, frames f, argument k -> key frames."""

_TERMS: dict[str, tuple[bool, Term]] = {
    "self": (False, lambda i, f, k: {i}),
    "first": (False, lambda i, f, k: {0}),
    "previous": (False, lambda i, f, k: {max(i - 1, 0)}),
    "all": (False, lambda i, f, k: range(f)),
    "window": (True, lambda i, f, k: range(max(i - k + 1, 0), i + 1)),
    "sink": (True, lambda i, f, k: range(min(k, f))),
    "keyframes": (True, lambda i, f, k: {i // k * k, max(i - 1, 0)}),
    "chunk": (True, lambda i, f, k: range(i // k * k, min(i // k * k + k, f))),
    "past": (False, lambda i, f, k: range(i + 1)),
}


@dataclass(frozen=True)
class FramePlan:
    """Plan of the frames that each frame reads, as a sum of terms.

    ``first+previous`` (Tune-A-Video, VideoBooth; a frame's own keys are not included), ``first`` (Text2Video-Zero),
    ``self``, ``self+first``, ``window(k)`` (the last k frames, its own among them), ``keyframes(m)`` (the keyframe at
    or before it, every m-th frame, and the previous frame), ``sink(s)+window(k)``, ``all`` (joint space-time),
    ``chunk(k)+past`` (every frame up to the end of its chunk of k: CausVid, Self-Forcing) or ``chunk(k)+window(m)``.
    A key is read once however many terms name it.
    """

    text: str

    def __post_init__(self) -> None:
        self.frames(1)  # raises on a plan that does not parse

    def frames(self, count: int) -> Frames:
        """Return the key frames that each of `count` query frames reads."""
        return _frames(self.text, operator.index(count))  # a constant, not a symbol of torch.compile

    def between(self, queries: Sequence[int], keys: Sequence[int]) -> Frames:
        """Return the positions in `keys` that each query frame reads; both are told by their indices in the video.

        Frames that a query reads, but `keys` lacks, are left out.
        """
        return _between(self.text, tuple(queries), tuple(keys))

    def reads(self, frame: int) -> tuple[int, ...]:
        """Return the frames that a frame of a video without end reads. ValueError: the plan has `all`."""
        if not self.causal:
            raise ValueError(
                f"plan {self.text!r} reads frames that come later, which a video made in parts does not have yet; use"
                " first, previous, self, window(k), keyframes(m), sink(s), chunk(k), past"
            )
        return tuple(sorted({j for reads, k in _terms(self.text) for j in reads(frame, UNLIMITED_FRAMES, k)}))

    def kept(self, start: int) -> tuple[int, ...]:
        """Return the frames before `start` that frame `start` or a later one may read: what a cache has to hold.

        A frame that frame `start` does not read, no later one reads: no term comes back to a frame.
        """
        return tuple(j for j in self.reads(start) if j < start)

    @property
    def causal(self) -> bool:
        """True if no frame reads later ones, but for the first s frames of `sink(s)` and those of its `chunk(k)`."""
        return all(part.strip() != "all" for part in self.text.split("+"))


@constant
def _frames(text: str, count: int) -> Frames:
    return _compile(text, count)


@lru_cache(maxsize=256)
def _compile(text: str, count: int) -> Frames:
    terms = _terms(text)
    return tuple(tuple(sorted({j for reads, k in terms for j in reads(i, count, k)})) for i in range(count))


@constant
def _between(text: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> Frames:
    return _cached_between(text, queries, keys)


@lru_cache(maxsize=1024)
def _cached_between(text: str, queries: tuple[int, ...], keys: tuple[int, ...]) -> Frames:
    terms, places = _terms(text), {frame: place for place, frame in enumerate(keys)}
    count = max((*queries, *keys), default=0) + 1
    return tuple(
        tuple(sorted({places[j] for reads, k in terms for j in reads(i, count, k) if j in places}))
        for i in queries
    )


def _terms(text: str) -> list[tuple[Term, int]]:
    return [_term(part.strip(), text) for part in text.split("+")]


def _term(part: str, text: str) -> tuple[Term, int]:
    match = re.fullmatch(r"([a-z]+)(?:\((\d+)\))?", part)
    name, argument = (match[1], match[2]) if match else (part, None)
    takes, reads = _TERMS.get(name, (None, None))
    if reads is None:
        known = ", ".join(f"{n}(k)" if takes_k else n for n, (takes_k, _) in _TERMS.items())
        raise ValueError(f"plan {text!r}: unknown term {part!r}; use a sum of {known}")
    if takes != (argument is not None) or (argument is not None and int(argument) < 1):
        raise ValueError(
            f"plan {text!r}: write {name}(k) with k >= 1"
            if takes
            else f"plan {text!r}: {name} takes no argument"
        )
    return reads, int(argument or 0)


def seen_by_all(count: int, groups: int = 1) -> Frames:
    """Let each of `count` query frames read every group (text tokens, a reference for all frames)."""
    return (tuple(range(groups)),) * count


@lru_cache(maxsize=256)
def with_context(
    frames: Frames, context: int, one_way: bool, readers: tuple[bool, ...] | None = None
) -> Frames:
    """Put `context` frames before those of a plan: every frame reads them, or those that `readers` mark.

    one_way: the context frames read only each other; otherwise they read all frames.
    """
    leading = tuple(range(context))
    every = tuple(range(context + len(frames)))
    return (leading if one_way else every,) * context + tuple(
        (leading if reading else ()) + tuple(context + j for j in reads)
        for reads, reading in zip(frames, readers or (True,) * len(frames), strict=True)
    )
