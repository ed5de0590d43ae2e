"""A block of Wan: attention over all frames, to the text (and image), and an MLP.

Norms, modulation and gated residuals are computed in float32 at least and rounded once, as the weights were trained.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Frames, Segment, attend
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Injection, Role, Site
from dit_booth.models.layers import Attention, Linear, Sole
from dit_booth.models.modulation import ShiftScaleGate
from dit_booth.models.positions import ImageRotary, Rotary
from dit_booth.models.wan.config import WanConfig


class WanInputs(NamedTuple):
    """Inputs that all blocks of one forward pass share."""

    modulation: Tensor  # (f) b 6d, projected timestep embedding
    text: Tensor  # b 1 l d
    image: Tensor | None  # b 1 m d, for the keys of their own that image-to-video weights have
    plan: Frames  # of attn1
    rotary: Rotary  # of attn1
    image_rotary: ImageRotary  # of attn1, for a reference's keys


def wide(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- norms -------------------------------------------------------------------------------------------------


class WideLayerNorm(nn.LayerNorm):
    """Layer norm computed and returned in float32 at least; the caller rounds."""

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        weight, bias = (None if y is None else y.to(x.dtype) for y in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class AcrossHeadsNorm(nn.Module):
    """RMS norm of queries or keys in heads (... k d) over their whole width k d."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.shape[-2:]
        return F.rms_norm(x, heads, rearrange(self.weight, "(k d) -> k d", k=heads[0]), eps=1e-6)


# ---- sub-layers --------------------------------------------------------------------------------------------


class WanAttention(Attention):
    """`Attention` with norms across heads, and with keys of their own for image states where `reads_image`."""

    def __init__(self, name: str, role: Role, config: WanConfig, *, reads_image: bool = False) -> None:
        hidden = config.shape.hidden
        rotary, heads = role == "cross_frame", config.shape.heads
        super().__init__(name, role, hidden, heads, bias=True, kernel=config.attention, rotary=rotary)
        self.add_module("to_out", Sole(self.to_out))
        self.norm_q, self.norm_k = AcrossHeadsNorm(hidden), AcrossHeadsNorm(hidden)
        self.reads_image = reads_image
        if reads_image:
            self.add_k_proj, self.add_v_proj = Linear(hidden, hidden), Linear(hidden, hidden)
            self.norm_added_k = AcrossHeadsNorm(hidden)
            added = {"add_k_proj": self.add_k_proj, "add_v_proj": self.add_v_proj}
            self.site: Site = replace(self.site, projections={**self.site.projections, **added})

    def image_norm(self) -> nn.Module | None:
        return self.norm_added_k if self.reads_image else None

    def attend_to_text(self, x: Tensor, text: Tensor, image: Tensor | None, inject: Injection) -> Tensor:
        """Attend to the text (b 1 l d), and add a softmax over the image states alone (b 1 m d): (b f n d)."""
        frames = seen_by_all(x.shape[1])
        qkv = self.project(x, text, frames, inject)
        if image is not None:
            k, v = (self.split(layer(image, inject)) for layer in (self.add_k_proj, self.add_v_proj))
            added = Segment(self.norm_added_k(k), v, frames)
            qkv = qkv.adding(attend(qkv.q, (added,), self.kernel))
        return self.read(inject(self.site, qkv), inject)


class Gelu(nn.Module):
    """GELU of a linear layer; `tanh`: its approximation."""

    def __init__(self, dim: int, dim_out: int, approximate: str) -> None:
        super().__init__()
        self.proj = Linear(dim, dim_out)
        self.approximate = approximate

    def forward(self, x: Tensor, inject: Injection) -> Tensor:
        return F.gelu(self.proj(x, inject), approximate=self.approximate)


class FeedForward(nn.Module):
    """MLP with one hidden layer: (... dim) -> (... dim_out); ``net.1`` stands for upstream's dropout."""

    def __init__(self, dim: int, inner: int, dim_out: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.net = nn.Sequential(Gelu(dim, inner, approximate), nn.Identity(), Linear(inner, dim_out))

    def forward(self, x: Tensor, inject: Injection) -> Tensor:
        gelu, _, down = self.net
        y: Tensor = down(gelu(x, inject), inject)
        return y


# ---- the block ---------------------------------------------------------------------------------------------


class WanBlock(nn.Module):
    """Cross-frame attention by plan, text attention, an MLP; x: (b f n d)."""

    def __init__(self, name: str, config: WanConfig) -> None:
        super().__init__()
        hidden = config.shape.hidden
        self.norm1, self.norm3 = (WideLayerNorm(hidden, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm2 = WideLayerNorm(hidden, eps=1e-6) if config.cross_attn_norm else nn.Identity()
        self.attn1 = WanAttention(f"{name}.attn1", "cross_frame", config)
        self.attn2 = WanAttention(f"{name}.attn2", "text", config, reads_image=config.image_dim > 0)
        self.ffn = FeedForward(hidden, config.shape.ffn, hidden)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, hidden) / hidden**0.5)

    def forward(self, x: Tensor, shared: WanInputs, inject: Injection) -> Tensor:
        vector = wide(shared.modulation) + self.scale_shift_table.flatten()
        attn, ffn = ShiftScaleGate.split(vector, 2, 3)
        h = attn.modulate(self.norm1(x)).to(x.dtype)
        y = self.attn1(h, h, shared.plan, inject, shared.rotary, shared.image_rotary)
        x = attn.add_residual(wide(x), wide(y)).to(x.dtype)
        x = x + self.attn2.attend_to_text(self.norm2(x).to(x.dtype), shared.text, shared.image, inject)
        y = self.ffn(ffn.modulate(self.norm3(x)).to(x.dtype), inject)
        return ffn.add_residual(wide(x), wide(y)).to(x.dtype)

    def sites(self) -> list[Site]:
        """Return the block's sites, in the order of the forward pass."""
        return [self.attn1.site, self.attn2.site]
