"""The seam between a backbone and a strategy: sites, payloads, conditions and injections.

Data flows one way: ``strategy(reference) -> Condition -> Injection(taps, condition) -> backbone(x, t, text, inject)``.
A backbone has one line per site, ``payload = inject(self.site, payload)``; the default ``no_injection`` returns its
argument. A port is narrow: a payload, never the layer itself.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Segment

Port = Literal["prompt", "latents", "modulation", "qkv"]
Role = Literal["cross_frame", "text", "temporal", "time", "block", "entry", "exit", "words"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Site:
    """A named point in a backbone.

    ``name`` equals the parameter path (``blocks.3.attn1``), so that one glob language selects sites and parameters.
    ``projections`` are the layers that made the payload; a tap may warm-start from a copy (`copy_of`), never use them.
    """

    name: str
    port: Port
    role: Role
    dim: int
    heads: int = 1
    projections: Mapping[str, nn.Linear] = field(default_factory=dict, repr=False)

    def copy_of(self, projection: str) -> nn.Linear:
        """A fresh trainable copy of one of the site's own projections (VideoBooth clones ``to_k`` and ``to_v``)."""
        return copy.deepcopy(self.projections[projection]).requires_grad_(True)


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """All sites of a model, and the widths of the image features that a strategy may read."""

    items: tuple[Site, ...]
    image_dim: int  # width of the image tower's hidden states
    image_embed_dim: int  # width of the image tower's pooled embedding
    latent_channels: int
    frames: int  # frames of a training video

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def match(self, pattern: str, *, port: Port | None = None, role: Role | None = None) -> list[Site]:
        """Sites whose name matches the glob, of a port and role; none at all is an error, never a silent nothing."""
        of_kind = [s for s in self.items if port in (None, s.port) and role in (None, s.role)]
        found = [s for s in of_kind if fnmatchcase(s.name, pattern)]
        if not found:
            names = [s.name for s in of_kind]
            raise ValueError(
                f"site glob {pattern!r} matches none of the {len(names)} sites of port {port or 'any'}"
                f" and role {role or 'any'}{suggest(pattern, names)}"
            )
        return found

    def of(self, *, port: Port | None = None, role: Role | None = None) -> list[Site]:
        """Sites of a port and role; may be empty (a DiT has no text attention by default)."""
        return [s for s in self.items if port in (None, s.port) and role in (None, s.role)]


def suggest(name: str, known: Iterable[str]) -> str:
    """``; nearest: a, b`` for an error message; the whole list where nothing is near and it is short."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:6]
    return f"; nearest: {', '.join(near)}" if near else ""


# ---- payloads: one type per port ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTokens:
    """Port ``prompt``: token embeddings before positions are added and the text transformer runs."""

    embeddings: Tensor  # b l d
    ids: Tensor  # b l
    spans: Tensor  # b l; k where the k-th occurrence of the subject stands, else 0


@dataclass(frozen=True)
class Latents:
    """Port ``latents``: what enters the backbone (site ``latents.entry``) and what leaves it (``latents.exit``)."""

    x: Tensor  # b f c h w


@dataclass(frozen=True)
class Modulation:
    """Port ``modulation``: a vector that scales and shifts features, and what it was projected from."""

    vector: Tensor  # b d
    source: Tensor  # b c


@dataclass(frozen=True)
class QKV:
    """Port ``qkv``: queries, the segments they read, and what both were projected from.

    The attention that follows is one exact joint softmax over all segments (`dit_booth.attention.attend`).
    """

    q: Tensor  # b f n k d
    segments: tuple[Segment, ...]
    x: Tensor  # b f n c, the normalised hidden state that the queries were projected from
    source: Tensor  # b g m c, what keys and values were projected from: x itself, or the text tokens
    kernel: str = "auto"  # the attention kernel that the run asked for

    def heads(self, x: Tensor) -> Tensor:
        """Split a projection's output (b g m c) into this attention's heads: (b g m k d)."""
        return rearrange(x, "b g m (k d) -> b g m k d", k=self.q.shape[-2])

    def reading(self, *segments: Segment) -> QKV:
        """The same with further segments in the joint softmax."""
        return replace(self, segments=self.segments + segments)


Payload = TypeVar("Payload", PromptTokens, Latents, Modulation, QKV)


# ---- what a strategy makes of the reference -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The image prompt as strategies see it. Rows without an image hold the zero image (VideoBooth's dropout)."""

    image: Tensor  # b 3 s s in [-1, 1]
    states: tuple[Tensor, ...]  # five of b (1 + n) d: CLIP image states, last first, then depths 1/6 .. 4/6
    embedding: Tensor  # b e, CLIP's pooled image embedding
    latent: Tensor  # b 1 c h w, clean
    noisy: Tensor  # b 1 c h w, noised to the video's timestep
    record: Callable[[Tensor, bool, Sequence[str]], Mapping[str, Tensor]] | None = None

    def hidden(self, sites: Sequence[str], noise: Literal["matched", "clean"]) -> Mapping[str, Tensor]:
        """The reference's hidden state at cross-frame sites: it runs through the backbone as one frame, null text.

        Returns site name -> (b n c). ``matched`` noises it to the video's timestep (VideoBooth section 3.3), ``clean``
        keeps it at timestep 0.
        """
        assert self.record is not None, "a Reference records only inside Injected.forward"
        clean = noise == "clean"
        return self.record(self.latent if clean else self.noisy, clean, sites)


@dataclass(frozen=True)
class Condition:
    """What a strategy made of the reference in this step, for its taps. The empty one means: no image."""

    tokens: Tensor | None = None  # b m c, shared by all sites
    vector: Tensor | None = None  # b c, pooled
    hidden: Mapping[str, Tensor] = field(default_factory=dict)  # site name -> b m c
    latent: Tensor | None = None  # b 1 c h w
    penalty: Tensor | None = None  # scalar, added to the training loss


NO_IMAGE = Condition()


class Injection:
    """Taps bound to this step's conditions; called by the backbone at every site."""

    def __init__(self, taps: Mapping[str, Sequence[tuple[nn.Module, Condition]]]) -> None:
        self.taps = taps

    def __call__(self, site: Site, payload: Payload) -> Payload:
        for tap, condition in self.taps.get(site.name, ()):
            payload = tap(payload, condition)
        return payload


no_injection = Injection({})


class Recorder(Injection):
    """Records the hidden states at sites while the strategy's own taps stay active.

    The reference never reads the video, so a pass of its own equals the original's lockstep.
    """

    def __init__(self, inner: Injection, sites: Sequence[str]) -> None:
        super().__init__(inner.taps)
        self.wanted = frozenset(sites)
        self.hidden: dict[str, Tensor] = {}

    def __call__(self, site: Site, payload: Payload) -> Payload:
        if site.name in self.wanted:
            assert isinstance(payload, QKV), f"{site.name} has no hidden state to record"
            self.hidden[site.name] = payload.x.flatten(1, 2)  # b f n c -> b (f n) c
        return super().__call__(site, payload)
