"""Layers that the backbones share: the embedding of the timestep, and attention behind the `qkv` port."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from dit_booth.attention import Frames, Segment, attend, attend_in_windows
from dit_booth.inject import QKV, Injection, Modulation, Role, Site
from dit_booth.models.positions import Rotary


def frame_timesteps(t: Tensor, frames: int, context: int = 0) -> Tensor:
    """Return timesteps as the backbones embed them: t (b,) as it is, and one for each frame (b f) as (c + f, b).

    Frames come first, so that what holds for a video (b d) adds to them. The `context` frames before the video get the
    timestep of frame 0. ValueError: t fits neither the videos nor their `frames`.
    """
    if t.ndim == 1:
        return t
    if t.ndim != 2 or t.shape[1] != frames:
        raise ValueError(
            f"t is {tuple(t.shape)}; give one timestep per video (b,), or one per frame (b f) with f = {frames}"
        )
    by_frame = rearrange(t, "b f -> f b")
    return torch.cat([by_frame[:1].expand(context, -1), by_frame]) if context else by_frame


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of t (...), cosines first, in float32: (... dim). Transformer section 3.5."""
    half = dim // 2
    frequency = torch.exp(
        -math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half
    )
    angle = rearrange(t.float(), "... -> ... 1") * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """t (...) -> (... dim) through the `modulation` port, whose source is the sinusoidal embedding (... width).

    Computed in the precision of the layers' weights.
    """

    def __init__(self, name: str, width: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.width = width
        self.site = Site(name=name, port="modulation", role="time", dim=dim)

    def forward(self, t: Tensor, dtype: torch.dtype, inject: Injection) -> Tensor:
        source = timestep_embedding(t, self.width)
        hidden = self.linear_1(source.to(self.linear_1.weight.dtype))
        t_emb = self.linear_2(nn.functional.silu(hidden)).to(dtype)
        return inject(self.site, Modulation(t_emb, source.to(dtype))).vector


# ---- compilation -------------------------------------------------------------------------------------------


@runtime_checkable
class CompiledByBlock(Protocol):
    """A backbone whose blocks can be compiled one by one."""

    def compile_blocks(self, **options: object) -> None:
        """Compile each block; the options are torch.compile's."""


def compile_each(blocks: nn.ModuleList, **options: object) -> None:
    """Compile each block with torch.compile; equal blocks share code, so this costs about one compilation.

    The options are torch.compile's. Parameter names stay.
    """
    # A tap that reads its site's name is recompiled for each block.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(blocks))
    allow_einops_in_graph()
    for block in blocks:
        block.compile(**{"fullgraph": True, "dynamic": False, **options})


def allow_einops_in_graph() -> None:
    """Keep torch.compile from tracing einops' parser, which would take most of the compilation."""
    for function in (rearrange, repeat):
        torch.compiler.allow_in_graph(function)


# ---- attention ---------------------------------------------------------------------------------------------


class HeadNorm(NamedTuple):
    """RMS norm of queries and keys in heads, then rotary positions (`QKV.layer`)."""

    kernel: str
    raw_q: Tensor  # b f n c
    norm_q: nn.Module
    norm_k: nn.Module
    rotary: Rotary | None
    image_rotary: Rotary | None = None  # of a reference: one group
    norm_image: nn.Module | None = None  # of a reference's keys, if not norm_k

    def queries(self, q: Tensor) -> Tensor:
        q = self.norm_q(q)
        return q if self.rotary is None else self.rotary.apply(q)

    def keys(self, k: Tensor) -> Tensor:
        k = self.norm_k(k)
        return k if self.rotary is None else self.rotary.apply(k)

    def image_keys(self, k: Tensor) -> Tensor:
        k = (self.norm_k if self.norm_image is None else self.norm_image)(k)
        return k if self.image_rotary is None else self.image_rotary.apply(k)


class Projected(Segment):
    """Keys and values of an attention, projected on first access: a tap that replaces them saves the work."""

    @classmethod
    def later(cls, k: Callable[[], Tensor], v: Callable[[], Tensor], frames: Frames) -> Projected:
        self = cls.__new__(cls)
        for name, value in (("project", {"k": k, "v": v}), ("frames", frames)):
            object.__setattr__(self, name, value)
        return self

    def __getattr__(self, name: str) -> Tensor:
        """Project k or v on first access."""
        if name not in ("k", "v"):
            raise AttributeError(name)
        value: Tensor = self.__dict__["project"][name]()
        object.__setattr__(self, name, value)
        return value


class Attention(nn.Module):
    """Projections around `attend`, with the `qkv` port between: one class for frames, text and time.

    ``site.name`` equals the module's path. x: (b f n c); source: (b g m c), what keys and values come from (x itself
    for self-attention); frames: which groups of the source each of the f query frames reads.
    """

    def __init__(
        self,
        name: str,
        role: Role,
        dim: int,
        heads: int,
        source_dim: int | None = None,
        bias: bool = False,
        kernel: str = "auto",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{name}: width {dim} is not divisible by {heads} heads")
        source_dim = source_dim or dim
        self.heads, self.kernel = heads, kernel
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(source_dim, dim, bias=bias)
        self.to_v = nn.Linear(source_dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q: nn.Module
        self.norm_k: nn.Module
        self.norm_q, self.norm_k = (
            nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.site = Site(
            name=name,
            port="qkv",
            role=role,
            dim=dim,
            heads=heads,
            projections={"to_q": self.to_q, "to_k": self.to_k, "to_v": self.to_v},
        )

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        frames: Frames,
        inject: Injection,
        rotary: Rotary | None = None,
        image_rotary: Rotary | None = None,
    ) -> Tensor:
        return self.read(inject(self.site, self.project(x, source, frames, rotary, image_rotary)))

    def project(
        self,
        x: Tensor,
        source: Tensor,
        frames: Frames,
        rotary: Rotary | None = None,
        image_rotary: Rotary | None = None,
    ) -> QKV:
        """Queries of x, keys and values of the source: the payload of the site. image_rotary: of a reference's keys."""
        norms = self.norm_q, self.norm_k
        layer = HeadNorm(self.kernel, self.to_q(x), *norms, rotary, image_rotary, self.image_norm())
        own = Projected.later(
            lambda: layer.keys(self.split(self.to_k(source))), lambda: self.split(self.to_v(source)), frames
        )
        return QKV(layer.queries(self.split(layer.raw_q)), (own,), x, source, layer)

    def image_norm(self) -> nn.Module | None:
        """Return the norm of a reference's keys; none: that of the attention's own."""
        return None

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b f n (k d) -> b f n k d", k=self.heads)

    def read(self, qkv: QKV) -> Tensor:
        """The joint softmax over the segments, and what is added, through the output projection: (b f n c)."""
        if not qkv.segments:
            return qkv.x
        if qkv.fusion is None:
            y = attend(qkv.q, qkv.segments, qkv.layer.kernel)
        else:
            y = attend_in_windows(qkv.q, qkv.segments, qkv.fusion, qkv.layer.kernel)
        y = y if qkv.added is None else y + qkv.added
        out: Tensor = self.to_out(rearrange(y, "b f n k d -> b f n (k d)"))
        return out
