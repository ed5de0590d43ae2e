"""The seam between a backbone and a strategy: sites, conditions and injections; payloads stand in `payloads.py`.

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
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor, nn

from dit_booth.attention import Clip
from dit_booth.errors import suggest
from dit_booth.payloads import (
    KV,
    QKV,
    AuxPrediction,
    Latents,
    Layer,
    Modulation,
    Place,
    PlainLayer,
    Projection,
    PromptTokens,
    Residuals,
)

__all__ = [
    "KV",
    "QKV",
    "AuxPrediction",
    "BlockGroup",
    "Bound",
    "Condition",
    "Dims",
    "FirstFrame",
    "Hidden",
    "Injection",
    "Latents",
    "Layer",
    "Modulation",
    "Needs",
    "Noise",
    "Payload",
    "Place",
    "PlainLayer",
    "Port",
    "Projection",
    "PromptTokens",
    "Recorder",
    "Reference",
    "Residuals",
    "Role",
    "Site",
    "Sites",
    "Tap",
    "no_injection",
    "timestep_of_reference",
]

Port = Literal["prompt", "latents", "modulation", "qkv", "linear", "residual"]
Role = Literal[
    "cross_frame", "text", "temporal", "time", "block", "entry", "exit", "words", "linear", "blocks"
]


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

    def further_channels(self, channels: int) -> nn.Conv2d:
        """Return the weights of further input channels of the entry's own layer; zero at the start."""
        layer = self.embedding_of(channels)
        nn.init.zeros_(layer.weight)
        return layer

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


Payload = TypeVar("Payload", PromptTokens, Latents, Modulation, QKV, Projection, Residuals)
T = TypeVar("T")


# ---- the reference, and what a strategy makes of it -----------------------------------------------------------------

Noise = Literal["matched", "clean"]


@dataclass(frozen=True)
class FirstFrame:
    """The image prompt as the first frame of a video, for strategies that read it so (`Strategy.reads_first_frame`)."""

    latent: Tensor  # b k c h w, clean: the image, and frames of zeros after it where the autoencoder groups frames
    states: Tensor | None = (
        None  # b m e, of the encoder whose states image-to-video weights read; none: they do not
    )


@dataclass(frozen=True)
class Reference:
    """The image prompt as strategies see it. Rows without an image hold the zero image (VideoBooth's dropout)."""

    image: Tensor  # b 3 s s in [-1, 1]
    states: tuple[Tensor, ...]  # five of b (1 + n) d: CLIP image states, last first, then depths 1/6 .. 4/6
    embedding: Tensor  # b e, CLIP's pooled image embedding
    latent: Tensor  # b 1 c h w, clean
    noisy: Tensor | None = None  # b r c h w, r copies at the video's timestep; for the recording pass alone
    further: tuple[Reference, ...] = ()  # more image prompts, in order; the fields above are the first one's
    first_frame: FirstFrame | None = None  # the first one's, if an active strategy reads it

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
