"""The seam between a backbone and a strategy: sites, payloads, conditions and injections.

Data flows one way: ``strategy(reference) -> Condition -> Injection(taps, condition) -> backbone(x, t, text, inject)``.
A backbone has one line per site, ``payload = inject(self.site, payload)``; the default ``no_injection`` returns its
argument. A port is narrow: a payload, never the layer itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, Protocol, TypeVar

from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Frames, Segment
from dit_booth.errors import suggest

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
    leaf: str = field(init=False, repr=False)  # the name's last part: the same in every block

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaf", self.name.rpartition(".")[2])

    def copy_of(self, projection: str, from_width: int = 0) -> nn.Linear:
        """A fresh trainable copy of one of the site's own projections (VideoBooth clones ``to_k`` and ``to_v``).

        Where it is to read features of another width (`from_width`), a new layer of the same outputs.
        """
        own = self.projections[projection]
        if from_width not in (0, own.in_features):
            return nn.Linear(from_width, own.out_features, bias=own.bias is not None)
        return copy.deepcopy(own).requires_grad_(True)


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


# ---- payloads: one type per port ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptTokens:
    """Port ``prompt``: token embeddings before positions are added and the text transformer runs."""

    embeddings: Tensor  # b l d
    ids: Tensor  # b l
    spans: Tensor  # b l; k where the k-th whole occurrence of the subject stands, else 0
    subjects: Tensor  # b s; the ids of the subject's own tokens, then -1


@dataclass(frozen=True)
class Latents:
    """Port ``latents``: what enters the backbone (site ``latents.entry``) and what leaves it (``latents.exit``)."""

    x: Tensor  # b f c h w
    context: int = 0  # leading frames outside the video, at times before 0, that every frame reads
    one_way: bool = True  # whether those read only themselves, or everything
    aux_prediction: AuxPrediction | None = (
        None  # at the exit: what is cut off the output, yet belongs to the loss
    )


class AuxPrediction(NamedTuple):
    """A prediction outside the video, and the noise-free latents that entered there (b f c h w each)."""

    prediction: Tensor
    latent: Tensor


@dataclass(frozen=True)
class Modulation:
    """Port ``modulation``: a vector that scales and shifts features, and what it was projected from."""

    vector: Tensor  # b d
    source: Tensor  # b c


class Finish(Protocol):
    """What an attention does to its queries and keys after the split into heads: QK-norm, rotary positions."""

    def queries(self, q: Tensor) -> Tensor: ...

    def keys(self, k: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class QKV:
    """Port ``qkv``: queries, the segments they read, and what both were projected from.

    The attention that follows is one exact joint softmax over all segments (`dit_booth.attention.joint_softmax`).
    """

    q: Tensor  # b f n k d
    segments: tuple[Segment, ...]
    x: Tensor  # b f n c, the normalised hidden state that the queries were projected from
    source: Tensor  # b g m c, what keys and values were projected from: x itself, or the text tokens
    kernel: str = "auto"  # the attention kernel that the run asked for
    finish: Finish | None = None
    projected: Tensor | None = None  # b f n c, the queries as they were projected, before `finish`
    image_query: Tensor | None = None  # b f n k d, the queries with which segments of the image are read
    added: Tensor | None = None  # b f n k d, joins the attention's result: a softmax of its own (IP-Adapter)

    def heads(self, x: Tensor) -> Tensor:
        """Split a projection's output (b g m c) into this attention's heads: (b g m k d). Values need no more."""
        return rearrange(x, "b g m (k d) -> b g m k d", k=self.q.shape[-2])

    def keys(self, x: Tensor) -> Tensor:
        """Projected keys (b g m c) as this attention's own: (b g m k d), with its QK-norm and rotary positions.

        Groups of as many tokens as a frame has are placed as the first g frames (a reference: as frame 0); others,
        such as a token bank, have no place.
        """
        return self.heads(x) if self.finish is None else self.finish.keys(self.heads(x))

    def queries(self, x: Tensor) -> Tensor:
        """Projected queries (b f n c) as this attention's own: (b f n k d), as `keys`."""
        return self.heads(x) if self.finish is None else self.finish.queries(self.heads(x))

    def reading(self, *segments: Segment) -> QKV:
        """The same with further segments in the joint softmax."""
        return replace(self, segments=self.segments + segments)

    def reading_image(self, k: Tensor, v: Tensor, frames: Frames | None = None) -> QKV:
        """The same, reading projected keys and values of the image (b m c): every frame does, or as `frames` say."""
        return self.reading(self.image(k, v, frames))

    def image(self, k: Tensor, v: Tensor, frames: Frames | None = None) -> Segment:
        """Projected keys and values of the image (b m c each) as one group, read with the image's queries."""
        k, v = (rearrange(y, "b m c -> b 1 m c") for y in (k, v))
        seen = ((0,),) * self.q.shape[1] if frames is None else frames
        return Segment(self.keys(k), self.heads(v), seen, query=self.image_query)

    def adding(self, x: Tensor) -> QKV:
        """The same with x (b f n k d) added to the attention's result."""
        return replace(self, added=x if self.added is None else self.added + x)

    def skipped(self) -> QKV:
        """The same without anything to read: the attention is left out and hands on its input x (CatVTON)."""
        return replace(self, segments=())


Payload = TypeVar("Payload", PromptTokens, Latents, Modulation, QKV)
T = TypeVar("T")


# ---- what a strategy makes of the reference -------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The image prompt as strategies see it. Rows without an image hold the zero image (VideoBooth's dropout)."""

    image: Tensor  # b 3 s s in [-1, 1]
    states: tuple[Tensor, ...]  # five of b (1 + n) d: CLIP image states, last first, then depths 1/6 .. 4/6
    embedding: Tensor  # b e, CLIP's pooled image embedding
    latent: Tensor  # b 1 c h w, clean
    noisy: (
        Tensor  # b r c h w, r copies with noise of their own at the video's timestep; one is enough (golden)
    )
    record: Callable[[Tensor, bool, Sequence[str]], Mapping[str, Tensor]] | None = None

    @property
    def present(self) -> Tensor:
        """Rows that have an image: b, boolean."""
        return self.image.flatten(1).any(dim=1)

    def hidden(self, sites: Sequence[str], noise: Literal["matched", "clean"]) -> Mapping[str, Tensor]:
        """The reference's hidden state at cross-frame sites: it runs through the backbone as one frame, null text.

        Returns site name -> (b n c). ``matched`` noises it to the video's timestep (VideoBooth section 3.3), ``clean``
        keeps it at timestep 0.
        """
        assert self.record is not None, "a Reference records only inside Injected.forward"
        clean = noise == "clean"
        return self.record(self.latent if clean else self.noisy, clean, sites)


class KV(NamedTuple):
    """Projected keys and values of the image for one attention, before the split into heads."""

    k: Tensor  # b m c
    v: Tensor  # b m c


@dataclass(frozen=True)
class Condition:
    """What a strategy made of the reference in this step, for its taps. The empty one means: no image."""

    tokens: Tensor | None = None  # b m c, shared by all sites
    vector: Tensor | None = None  # b c, pooled
    hidden: Mapping[str, Tensor] = field(default_factory=dict)  # site name -> b m c
    here: Tensor | None = (
        None  # b m c, what `hidden` holds for the tap's own site; set where the taps are bound
    )
    kv: Mapping[str, KV] = field(default_factory=dict)  # site name -> the image's keys and values
    here_kv: KV | None = None  # what `kv` holds for the tap's own site
    latent: Tensor | None = None  # b 1 c h w
    aux_loss: Tensor | None = None  # scalar, added to the training loss

    def at(self, site: str) -> Condition:
        """The condition as the tap at a site gets it."""
        if site not in self.hidden and site not in self.kv:
            return self
        return replace(self, here=self.hidden.get(site), here_kv=self.kv.get(site))


NO_IMAGE = Condition()


class Injection:
    """Taps bound to this step's conditions; called by the backbone at every site.

    A `local` injection serves the sites of one block and knows them by the last part of their names.
    """

    def __init__(
        self, taps: Mapping[str, Sequence[tuple[nn.Module, Condition]]], *, local: bool = False
    ) -> None:
        self.taps, self.local = taps, local
        self.aux_prediction: AuxPrediction | None = (
            None  # what a tap at the exit cut off the output, for the loss
        )

    def __call__(self, site: Site, payload: Payload) -> Payload:
        for tap, condition in self.taps.get(site.leaf if self.local else site.name, ()):
            payload = tap(payload, condition)
        if isinstance(payload, Latents) and payload.aux_prediction is not None:
            self.aux_prediction = payload.aux_prediction
        return payload

    def inside(self, path: str) -> Injection:
        """What a block needs of this: the local injection of its sites.

        No block's name is left in it, so that torch.compile makes one code for all blocks. A subclass with a `__call__`
        of its own stays whole: it may look at names.
        """
        if type(self).__call__ is not Injection.__call__:
            return self
        return Injection(_below(path, self.taps), local=True)


def _below(path: str, named: Mapping[str, T]) -> dict[str, T]:
    """The entries under a module path, by the rest of their names."""
    return {k.removeprefix(f"{path}."): v for k, v in named.items() if k.startswith(f"{path}.")}


no_injection = Injection({})


class Recorder(Injection):
    """Records the hidden states at sites while the strategy's own taps stay active.

    The reference never reads the video, so a pass of its own equals the original's lockstep.
    """

    def __init__(self, inner: Injection, sites: Iterable[str], *, local: bool = False) -> None:
        super().__init__(inner.taps, local=local)
        self.wanted = frozenset(sites)
        self.own: dict[str, Tensor] = {}
        self.parts: dict[str, Recorder] = {}

    @property
    def hidden(self) -> dict[str, Tensor]:
        """Site name -> hidden state (b (f n) c), of this and of the blocks' own recorders."""
        below = {f"{path}.{k}": v for path, part in self.parts.items() for k, v in part.hidden.items()}
        return {**self.own, **below}

    def __call__(self, site: Site, payload: Payload) -> Payload:
        name = site.leaf if self.local else site.name
        if name in self.wanted:
            assert isinstance(payload, QKV), f"{site.name} has no hidden state to record"
            self.own[name] = payload.x.flatten(1, 2)  # b f n c -> b (f n) c
        return super().__call__(site, payload)

    def inside(self, path: str) -> Injection:
        taps = Injection(_below(path, self.taps))
        self.parts[path] = Recorder(taps, _below(path, dict.fromkeys(self.wanted)), local=True)
        return self.parts[path]
