"""Payloads: what a site's taps are given and return, one type per port. Strategies import them from `dit_booth.inject`.

A payload holds tensors and what may be done with them, never the layer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Clip, Frames, Segment, WindowFusion, attend

Place = Literal["backbone", "before", "beyond"]
"""Rotary place of a reference's keys: the backbone's own (frame 0; on Wan `wan.reference_place`); the frame before
frame 0; that frame, with rows and columns that start where the video's end (Stand-In, arXiv 2508.07901)."""


@dataclass(frozen=True)
class PromptTokens:
    """Port ``prompt``: token embeddings before positions are added and the text transformer runs."""

    embeddings: Tensor  # b l d
    ids: Tensor  # b l
    spans: Tensor  # b l; k where the k-th whole occurrence of the subject stands, else 0
    subjects: Tensor  # b s; the ids of the subject's tokens, padded with -1


@dataclass(frozen=True)
class Latents:
    """Port ``latents``: what enters the backbone (site ``latents.entry``) and what leaves it (``latents.exit``)."""

    x: Tensor  # b f c h w
    known: Tensor | None = None  # b f 1 1 1, at the entry: 1 in frames of the video that are known
    added: Tensor | None = None  # b f d h w, at the entry: added to the embedded x, as of further channels
    image: Tensor | None = None  # b m e, at the entry: image states that image-to-video weights read (Wan)
    context: int = 0  # leading frames outside the video that every frame reads, at times before 0
    context_after: int = 0  # the last `context_after` of them are at times after the video's
    one_way: bool = True  # whether those read only themselves, or everything
    clip: Clip | None = None  # the frames' indices in a longer video; none: x is the whole video
    readers: tuple[bool, ...] | None = None  # frames of the video that the image reaches; none: all
    context_readers: tuple[bool, ...] | None = None  # frames of the video that read the context; none: all
    aux_prediction: AuxPrediction | None = (
        None  # at the exit: what is cut off the output, yet belongs to the loss
    )

    def adding(self, x: Tensor) -> Latents:
        """Return a copy with x (b f d h w) added to the embedded latents."""
        return replace(self, added=x if self.added is None else self.added + x)

    def filled(self, channels: Tensor, image: Tensor | None) -> Latents:
        """Return a copy with image-to-video weights' further channels (b f e h w) behind x, and image states."""
        return replace(self, x=torch.cat([self.x, channels], dim=2), image=image)


class AuxPrediction(NamedTuple):
    """A prediction outside the video, and the noise-free latents that entered there (b f c h w each)."""

    prediction: Tensor
    latent: Tensor


@dataclass(frozen=True)
class Modulation:
    """Port ``modulation``: a vector that scales and shifts features, and what it was projected from."""

    vector: Tensor  # b d; f b d where every frame has a timestep of its own: what holds for a video (b d) adds to both
    source: Tensor  # b c, or f b c


@dataclass(frozen=True)
class Projection:
    """Port ``linear``: what a linear layer makes (y) of its input (x), wherever the layer is used."""

    x: Tensor  # ... c
    y: Tensor  # ... d


@dataclass(frozen=True)
class Residuals:
    """Port ``residual``: what enters the blocks, and what is added to their outputs, by place (`Site.groups`)."""

    x: Tensor  # b f n d, embedded latents
    latents: Tensor  # b f c h w
    run: Callable[[Mapping[int, nn.Module], Tensor], Mapping[int, Tensor]]
    """Run copies of blocks, by number, the first group among them, on r frames before x, at times before the video's
    (b (r f) n d); return the outputs by place (b (r f) n d). No tap acts in them."""
    added: Mapping[int, Tensor] = field(default_factory=dict)  # b f n d

    def adding(self, added: Mapping[int, Tensor]) -> Residuals:
        """Return a copy with more to add."""
        own = self.added
        return replace(self, added={**own, **{i: own[i] + x if i in own else x for i, x in added.items()}})


class KV(NamedTuple):
    """The image's projected keys and values for one attention, before the split into heads."""

    k: Tensor  # b m c
    v: Tensor  # b m c


class Layer(Protocol):
    """The attention layer that a `QKV` belongs to, as far as taps may use it."""

    @property
    def kernel(self) -> str:
        """Name of the attention kernel that the run asked for."""

    @property
    def raw_q(self) -> Tensor | None:
        """Queries as projected, before heads, QK-norm and rotary positions (b f n c)."""

    def queries(self, q: Tensor) -> Tensor:
        """Apply QK-norm and rotary positions to queries in heads (b f n k d)."""

    def keys(self, k: Tensor) -> Tensor:
        """Apply QK-norm and rotary positions to keys in heads (b g m k d)."""

    def image_keys(self, k: Tensor, place: Place = "backbone") -> Tensor:
        """Apply QK-norm and the rotary positions of a reference at a place to keys in heads (b 1 m k d)."""


@dataclass(frozen=True)
class PlainLayer:
    """A `Layer` without QK-norm and rotary positions."""

    kernel: str = "auto"
    raw_q: Tensor | None = None

    def queries(self, q: Tensor) -> Tensor:
        return q

    def keys(self, k: Tensor) -> Tensor:
        return k

    def image_keys(self, k: Tensor, place: Place = "backbone") -> Tensor:
        return self.keys(k)


@dataclass(frozen=True)
class QKV:
    """Port ``qkv``: queries, the segments they read, and what both were projected from.

    The attention that follows is one exact joint softmax over all segments (`dit_booth.attention.attend`).
    """

    q: Tensor  # b f n k d
    segments: tuple[Segment, ...]
    x: Tensor  # b f n c, the normalised hidden state that the queries were projected from
    source: Tensor  # b g m c, what keys and values were projected from: x itself, or the text tokens
    layer: Layer = PlainLayer()
    image_query: Tensor | None = None  # b f n k d, the queries with which segments of the image are read
    added: Tensor | None = (
        None  # b f n k d, added to the attention's result: a softmax of its own (IP-Adapter)
    )
    subject: Tensor | None = (
        None  # b m, text attentions: True where the source's tokens stand for the subject
    )
    readers: tuple[bool, ...] | None = None  # query frames that read the image (`reference_at`); none: all
    fusion: WindowFusion | None = (
        None  # windows in which temporal attention reads; none: it reads all frames at once
    )

    def heads(self, x: Tensor) -> Tensor:
        """Split a projection's output (b g m c) into this attention's heads (b g m k d). Values need no more."""
        return rearrange(x, "b g m (k d) -> b g m k d", k=self.q.shape[-2])

    def keys(self, x: Tensor) -> Tensor:
        """Turn projected keys (b g m c) into this attention's keys (b g m k d), with its QK-norm and rotary positions.

        Groups with as many tokens as a frame get the positions of the first g frames; others, such as a token bank,
        get none.
        """
        return self.layer.keys(self.heads(x))

    def queries(self, x: Tensor) -> Tensor:
        """Turn projected queries (b f n c) into this attention's queries (b f n k d), as `keys`."""
        return self.layer.queries(self.heads(x))

    def reading(self, *segments: Segment) -> QKV:
        """Return a copy with further segments in the joint softmax."""
        return replace(self, segments=self.segments + segments)

    def reading_image(self, kv: KV, frames: Frames | None = None, place: Place = "backbone") -> QKV:
        """Return a copy that reads the image's keys and values: the `readers` do, or as `frames` say."""
        return self.reading(self.image(kv, frames, place))

    def image(self, kv: KV, frames: Frames | None = None, place: Place = "backbone") -> Segment:
        """Return the image's keys and values as a segment of one group, read with the image's queries.

        Places count from frame 0 of the video (from the first context frame, where there is one).
        """
        k, v = (rearrange(y, "b m c -> b 1 m c") for y in kv)
        if frames is None:
            count = self.q.shape[1]
            frames = tuple((0,) if reads else () for reads in self.readers or (True,) * count)
        keys = self.layer.image_keys(self.heads(k), place)
        return Segment(keys, self.heads(v), frames, query=self.image_query)

    def attended_image(self, kv: KV) -> Tensor:
        """Attend to the image alone, a softmax of its own (b f n k d): zero in frames that do not read it."""
        if self.readers is None or all(self.readers):
            return attend(self.q, (self.image(kv),), self.layer.kernel)
        everywhere = replace(self, readers=None)
        reads = self.q.new_tensor(self.readers)
        return everywhere.attended_image(kv) * rearrange(reads, "f -> f 1 1 1")

    def adding(self, x: Tensor) -> QKV:
        """Return a copy with x (b f n k d) added to the attention's result."""
        return replace(self, added=x if self.added is None else self.added + x)

    def skipped(self) -> QKV:
        """Return a copy that reads nothing: the attention is left out and returns its input x (CatVTON)."""
        return replace(self, segments=())
