"""The seam between a backbone and a strategy: sites, payloads, conditions and injections.

Data flows one way::

    strategy.needs() -> Needs                        # once: what to record of the reference's own pass
    record(reference) -> hidden                      # by the model: one pass for each kind of noise
    strategy(reference, hidden) -> Condition         # what each tap gets
    backbone(x, t, text, Injection(taps, condition))

A backbone has one line per site, ``payload = inject(self.site, payload)``; the default ``no_injection`` returns its
argument. A port is narrow: a payload, never the layer itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Clip, Frames, Segment, WindowFusion, attend
from dit_booth.errors import suggest

Port = Literal["prompt", "latents", "modulation", "qkv", "linear", "residual"]
Role = Literal[
    "cross_frame", "text", "temporal", "time", "block", "entry", "exit", "words", "linear", "blocks"
]
Place = Literal["backbone", "before", "beyond"]
"""Rotary place of a reference's keys: the backbone's own (frame 0; on Wan `wan.reference_place`); the frame before
frame 0; that frame, with rows and columns that start where the video's end (Stand-In, arXiv 2508.07901)."""


class BlockGroup(NamedTuple):
    """Blocks that attend in space and time together, and the places after them where something can be added."""

    blocks: Mapping[int, nn.Module]
    outputs: Mapping[int, int]  # place -> width


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
    rotary: bool = False  # qkv: if queries and keys get rotary positions
    projections: Mapping[str, nn.Linear] = field(default_factory=dict, repr=False)
    embed: nn.Conv2d | nn.Conv3d | None = field(default=None, repr=False)  # entry: embeds the latents
    groups: tuple[BlockGroup, ...] = field(default=(), repr=False)  # blocks: to be copied (`Residuals.run`)
    leaf: str = field(init=False, repr=False)  # the name inside its block: the same in every block

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaf", re.sub(r"^.*blocks\.\d+\.", "", self.name))

    def copy_of(self, projection: str, from_width: int = 0) -> nn.Linear:
        """Return a trainable copy of one of the site's projections (VideoBooth clones ``to_k`` and ``to_v``).

        If it is to read features of another width (`from_width`), a new layer with as many outputs.
        """
        own = self.projections[projection]
        if from_width not in (0, own.in_features):
            return nn.Linear(from_width, own.out_features, bias=own.bias is not None)
        layer = nn.Linear(
            own.in_features, own.out_features, bias=False, device="meta"
        )  # no site, as the own may have
        layer.weight = nn.Parameter(own.weight.detach().clone())
        layer.bias = None if own.bias is None else nn.Parameter(own.bias.detach().clone())
        return layer

    def embedding_of(self, channels: int, *, bias: bool = False) -> nn.Conv2d:
        """Return a new layer that embeds `channels` channels of a frame on the grid of the entry's own layer."""
        like = self.embed
        assert like is not None, "an entry site names the layer that embeds the latents"
        kernel, stride, padding = (
            y[-2:] for y in (like.kernel_size, like.stride, like.padding)
        )  # of one frame
        return nn.Conv2d(channels, like.out_channels, kernel, stride, padding, bias=bias)  # type: ignore[arg-type]

    def embedding_weight(self) -> Tensor:
        """Return the weight of the entry's own layer for the latents' channels of one frame: d c p q."""
        like = self.embed
        assert like is not None, "an entry site names the layer that embeds the latents"
        own = like.weight[:, : self.dim]
        return own if own.ndim == 4 else own[:, :, 0]


class Dims(NamedTuple):
    """Sizes of what a strategy may read besides the sites."""

    image_dim: int  # width of the image tower's hidden states
    image_embed_dim: int  # width of the image tower's pooled embedding
    latent_channels: int
    frames: int  # latent frames of a training video


@dataclass(frozen=True)
class Sites:
    """All sites of a model, in the order of the forward pass, then its linear layers'; with its `Dims`."""

    items: tuple[Site, ...]
    image_dim: int
    image_embed_dim: int
    latent_channels: int
    frames: int

    def __iter__(self) -> Iterator[Site]:
        return iter(self.items)

    def match(self, pattern: str, *, port: Port | None = None, role: Role | None = None) -> list[Site]:
        """Return the sites of a port and role whose name matches the glob. ValueError: there are none."""
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
        """Return the sites of a port and role; may be empty (a DiT has no text attention by default)."""
        return [s for s in self.items if port in (None, s.port) and role in (None, s.role)]


# ---- payloads: one type per port ------------------------------------------------------------------------------------


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


Payload = TypeVar("Payload", PromptTokens, Latents, Modulation, QKV, Projection, Residuals)
T = TypeVar("T")


# ---- the reference, and what a strategy makes of it -----------------------------------------------------------------

Noise = Literal["matched", "clean"]


@dataclass(frozen=True)
class Reference:
    """The image prompt as strategies see it. Rows without an image hold the zero image (VideoBooth's dropout)."""

    image: Tensor  # b 3 s s in [-1, 1]
    states: tuple[Tensor, ...]  # five of b (1 + n) d: CLIP image states, last first, then depths 1/6 .. 4/6
    embedding: Tensor  # b e, CLIP's pooled image embedding
    latent: Tensor  # b 1 c h w, clean
    noisy: Tensor | None = None  # b r c h w, r copies at the video's timestep; for the recording pass alone
    further: tuple[Reference, ...] = ()  # more image prompts, in order; the fields above are the first one's

    @property
    def all(self) -> tuple[Reference, ...]:
        """Every image prompt, the first one first; rows that have fewer hold the zero image."""
        return (self, *self.further)

    @property
    def present(self) -> Tensor:
        """Rows that have an image: b, boolean."""
        return self.image.flatten(1).any(dim=1)


@dataclass(frozen=True)
class Needs:
    """Hidden states that a strategy wants of the reference's own pass through the backbone: one frame, null text.

    The video's timestep is that of frame 0 where its frames have timesteps of their own (`timestep_of_reference`).

    Without noise at the video's timestep they are the same at every sampling step, and so is the condition.
    """

    sites: Sequence[str] = ()  # names of cross-frame sites, or of linear layers there; empty: no pass
    noise: Noise = (
        "clean"  # "matched": noised to the video's timestep (VideoBooth section 3.3); "clean": timestep 0
    )
    frames: int = 1  # matched: copies with noise of their own that pass as a video; the first is recorded

    @property
    def constant(self) -> bool:
        """True if the condition is the same at every timestep."""
        return not self.sites or self.noise == "clean"


def timestep_of_reference(t: Tensor) -> Tensor:
    """Return the timestep (b,) of a reference noised as its video: t (b,), or that of frame 0 of t (b f)."""
    return t if t.ndim == 1 else t[:, 0]


Hidden = Mapping[str, Tensor]
"""Site name -> the reference's hidden state there (b n c): an attention's input, or a linear layer's output."""


@dataclass(frozen=True)
class Condition:
    """A strategy's result for one step: the image as each of its taps gets it."""

    shared: object = None  # for every tap without an entry of its own
    at: Mapping[str, object] = field(default_factory=dict)  # site name -> for the tap there
    aux_loss: Tensor | None = None  # scalar, added to the training loss

    def image_at(self, site: str) -> object:
        """Return what the tap at a site gets."""
        return self.at.get(site, self.shared)


Tap = Callable[[Any, Any], Any]
"""payload, image -> payload: a module that a strategy attached."""
Bound = tuple[Tap, object]
"""A tap, and what its strategy made for it; None: no image."""


class Injection:
    """Taps bound to what their strategies made of the image; called by the backbone at every site.

    A `local` injection serves the sites of one block and knows them by the last part of their names. `clip`: the frames
    of the pass, if they are part of a longer video.
    """

    def __init__(
        self,
        taps: Mapping[str, Sequence[Bound]],
        *,
        local: bool = False,
        subject: Tensor | None = None,
        known: Tensor | None = None,
        clip: Clip | None = None,
    ) -> None:
        self.taps, self.local, self.clip = taps, local, clip
        self.known = known  # b f 1 1 1, the video's known frames, for the taps at the entry
        self.subject = subject  # b l, the subject's tokens in the prompt, for the taps that read the text
        self.aux_prediction: AuxPrediction | None = (
            None  # what a tap at the exit cut off the output, for the loss
        )

    def __call__(self, site: Site, payload: Payload) -> Payload:
        taps = self.taps.get(site.leaf if self.local else site.name, ())
        if taps and site.role == "text" and isinstance(payload, QKV):
            qkv: QKV = payload
            named: Any = replace(qkv, subject=self.subject)
            payload = named
        if self.known is not None and site.role == "entry" and isinstance(payload, Latents):
            latents: Latents = payload
            marked: Any = replace(latents, known=self.known)
            payload = marked
        for tap, image in taps:
            payload = tap(payload, image)
        if isinstance(payload, QKV) and payload.segments and self.clip is not None:
            payload = self._in_clip(site, payload, self.clip)
        if isinstance(payload, PromptTokens) and self.taps:
            self.subject = payload.spans > 0
        if isinstance(payload, Latents) and payload.aux_prediction is not None:
            self.aux_prediction = payload.aux_prediction
        return payload

    def _in_clip(self, site: Site, qkv: QKV, clip: Clip) -> Any:
        """Let frames read past ones, under the keys and values that the taps have left to them, or in windows."""
        if clip.fusion is not None and site.role == "temporal":
            qkv = replace(qkv, fusion=clip.fusion)
        if clip.cache is None:
            return qkv
        return qkv.reading(*clip.cache.extend(site.name, site.role, qkv.segments[0], clip.frames))

    def inside(self, path: str) -> Injection:
        """Return the local injection of a block's sites.

        It holds no block's name, so that torch.compile makes one code for all blocks. A subclass with its own
        `__call__` is returned whole: it may look at names.
        """
        if type(self).__call__ is not Injection.__call__:
            return self
        return Injection(_below(path, self.taps), local=True, subject=self.subject, clip=self.clip)


def _below(path: str, named: Mapping[str, T]) -> dict[str, T]:
    """Return the entries under a module path, keyed by the rest of their names."""
    return {k.removeprefix(f"{path}."): v for k, v in named.items() if k.startswith(f"{path}.")}


no_injection = Injection({})


class Recorder(Injection):
    """An injection that also records what enters attentions and what leaves linear layers; taps stay active.

    The reference never reads the video, so a separate pass equals VideoBooth's lockstep.
    """

    def __init__(self, inner: Injection, sites: Iterable[str], *, local: bool = False) -> None:
        super().__init__(inner.taps, local=local, subject=inner.subject)
        self.wanted = frozenset(sites)
        self.own: dict[str, Tensor] = {}
        self.parts: dict[str, Recorder] = {}

    @property
    def hidden(self) -> dict[str, Tensor]:
        """Site name -> hidden state (b (f n) c), from here and from the blocks' recorders."""
        below = {f"{path}.{k}": v for path, part in self.parts.items() for k, v in part.hidden.items()}
        return {**self.own, **below}

    def __call__(self, site: Site, payload: Payload) -> Payload:
        name = site.leaf if self.local else site.name
        tapped = super().__call__(site, payload)
        if name in self.wanted:
            assert isinstance(tapped, QKV | Projection), f"{site.name} has no hidden state to record"
            state = tapped.x if isinstance(tapped, QKV) else tapped.y
            self.own[name] = state.flatten(1, 2)  # b f n c -> b (f n) c
        return tapped

    def inside(self, path: str) -> Injection:
        taps = Injection(_below(path, self.taps), subject=self.subject)
        self.parts[path] = Recorder(taps, _below(path, dict.fromkeys(self.wanted)), local=True)
        return self.parts[path]
