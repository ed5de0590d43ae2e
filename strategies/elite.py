"""ELITE (arXiv 2302.13848): a global mapping to words (`token_replacement`), and a local one to keys and values.

The local mapping (section 3.2) gives every patch of the subject a key and a value in the text attention. What a query
reads of them is weighted by how much it attends to the subject's words. Without text attention (a DiT whose text
modulates), the cross-frame attention reads the patches unweighted.
"""

from dataclasses import dataclass, replace
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import attend
from dit_booth.errors import check_ranges
from dit_booth.inject import KV, QKV, Condition, Hidden, Reference, Role, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, alias, register

from .parts.mapper import LocalMapper

WHITE = 0.98
"""Pixels at least this bright in all channels, of [-1, 1], are background: image prompts are cut out on white."""


@dataclass(frozen=True, kw_only=True)
class EliteLocalConfig(AnchoredConfig):
    scale: float = 1.0
    """Weight of what is read of the patches (lambda; ELITE samples with 0.8); no parameter depends on it."""
    width: int = 0
    """Hidden width of the mapper's MLPs; 0: the image tower's own (1024 for ViT-L/14, as in ELITE)."""
    l1_weight: float = 1e-4
    """Weight of mean |value of a patch| in the loss."""
    where: str = "*"
    """Glob over the text attentions that also read the patches (cross-frame ones where the backbone has none)."""
    compat: Literal["", "released"] = ""
    """released: divide the subject's map by its maximum over the whole batch, not the sample (docs/fidelity.md)."""

    def __post_init__(self) -> None:
        self.check_anchors("elite_local")
        check_ranges(self, "elite_local", scale="[-1000, 1000]", width="[0, 65536]", l1_weight="[0, 1000]")
        if self.compat not in ("", "released"):
            raise ValueError(f"elite_local.compat is {self.compat!r}: choose released, or leave it empty")


@register("elite_local")
class EliteLocal(Strategy):
    """Text attention also reads the subject's patches, where it attends to the subject's words (ELITE, local)."""

    Config = EliteLocalConfig
    trains = {"fine": ("*",), "joint": ("*",)}
    order = 1  # after a tap that replaces the text's keys: the subject's map is that of the keys in use

    def __init__(self, config: EliteLocalConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        self.l1_weight = config.l1_weight
        role: Role = "text" if sites.of(port="qkv", role="text") else "cross_frame"
        chosen = sites.match(config.where, port="qkv", role=role)
        width = chosen[0].projections["to_k"].in_features  # the text's: patch features take its place
        self.mapper = LocalMapper(sites.image_dim, config.width or sites.image_dim, width)
        self.readers = {site.name: self.attach(site, LocalAttention(site, config)) for site in chosen}

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        patches = self.mapper(reference.states)  # b n c
        mask = patch_mask(subject_mask(reference).to(patches.dtype), patches.shape[1])
        made = {at: reader.project(patches, mask) for at, reader in self.readers.items()}
        return Condition(at=made, aux_loss=self.l1_weight * values_l1([kv.v for kv in made.values()]))


def subject_mask(reference: Reference) -> Tensor:
    """Return where the subject is, b 1 s s: what is not white; nothing in rows without an image."""
    seen = reference.image.amin(dim=1, keepdim=True) < WHITE
    return seen & rearrange(reference.present, "b -> b 1 1 1")


def patch_mask(mask: Tensor, patches: int) -> Tensor:
    """Sample a mask (b 1 s s) at a square grid of patches, by nearest neighbour: b n 1."""
    side = isqrt(patches)
    return rearrange(F.interpolate(mask, (side, side), mode="nearest"), "b c h w -> b (h w) c")


def values_l1(values: list[Tensor]) -> Tensor:
    """Return the mean over attentions of mean |value|: a scalar."""
    return torch.stack([v.abs().mean() for v in values]).mean()


class LocalAttention(nn.Module):
    """Keys and values of the patches; they start as the text's own."""

    def __init__(self, site: Site, config: EliteLocalConfig) -> None:
        super().__init__()
        self.scale, self.whole_batch = config.scale, config.compat == "released"
        width = site.projections["to_k"].in_features
        self.to_k_local, self.to_v_local = (site.copy_of(f"to_{y}", from_width=width) for y in "kv")

    def project(self, patches: Tensor, mask: Tensor) -> KV:
        """Project patches (b n c); masked ones (b n 1) get zeros, which keep their share of the softmax."""
        return KV(self.to_k_local(patches) * mask, self.to_v_local(patches) * mask)

    def forward(self, qkv: QKV, image: KV | None) -> QKV:
        if image is None:
            return qkv
        read = self.scale * qkv.attended_image(image)
        if qkv.subject is None:  # no text attention: nothing says where the subject is
            return qkv.adding(read)
        return qkv.adding(read * self.subject_map(qkv, qkv.subject))

    def subject_map(self, qkv: QKV, subject: Tensor) -> Tensor:
        """Return each query's attention to the subject's tokens (b m, boolean), at most 1: b f n k 1."""
        text = qkv.segments[0]  # read with values of 1 at those tokens, 0 elsewhere
        named = rearrange(subject.to(text.k.dtype), "b m -> b 1 m 1 1").expand_as(text.k)
        attention = attend(qkv.q, (replace(text, v=named),), qkv.layer.kernel)[..., :1]
        top = attention.amax() if self.whole_batch else attention.amax(dim=(1, 2, 3, 4), keepdim=True)
        return attention / top.clamp_min(torch.finfo(attention.dtype).tiny)


alias("elite", "token_replacement+elite_local")
