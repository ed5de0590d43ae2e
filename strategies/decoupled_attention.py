"""Decoupled attention: the image gets a softmax of its own beside the text's (IP-Adapter, arXiv 2308.06721, 3.2)."""

from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from dit_booth.errors import check_ranges
from dit_booth.inject import KV, QKV, Condition, Hidden, Reference, Role, Site, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register


@dataclass(frozen=True, kw_only=True)
class DecoupledAttentionConfig(AnchoredConfig):
    scale: float = 1.0
    """Weight of the image's softmax; no parameter depends on it, so it may be another one when sampling."""
    tokens: int = 4
    """Image tokens made of CLIP's image embedding."""
    where: str = "*"
    """Glob over the text attentions that also read the image (cross-frame ones where the backbone has none)."""

    def __post_init__(self) -> None:
        self.check_anchors("decoupled_attention")
        check_ranges(self, "decoupled_attention", scale="[-1000, 1000]", tokens="[1, 4096]")


@register("decoupled_attention")
class DecoupledAttention(Strategy):
    """Adds scale * Attn(Q, K_image, V_image) to every text attention's result (IP-Adapter)."""

    Config = DecoupledAttentionConfig
    trains = {"fine": ("*",), "joint": ("*",)}

    def __init__(self, config: DecoupledAttentionConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        role: Role = "text" if sites.of(port="qkv", role="text") else "cross_frame"
        chosen = sites.match(config.where, port="qkv", role=role)
        width = chosen[0].projections["to_k"].in_features  # the text's: image tokens take its place
        self.embed = ImageTokens(sites.image_embed_dim, config.tokens, width)
        self.readers = {
            site.name: self.attach(site, ImageAttention(site, width, config.scale)) for site in chosen
        }

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        tokens = self.embed(reference.embedding)
        return Condition(at={at: reader.project(tokens) for at, reader in self.readers.items()})


class ImageTokens(nn.Module):
    """CLIP's image embedding (b e) as m tokens (b m c)."""

    def __init__(self, embed_dim: int, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.project, self.norm = nn.Linear(embed_dim, tokens * width), nn.LayerNorm(width)

    def forward(self, embedding: Tensor) -> Tensor:
        tokens: Tensor = self.norm(rearrange(self.project(embedding), "b (m c) -> b m c", m=self.tokens))
        return tokens


class ImageAttention(nn.Module):
    """Keys and values of the image tokens.

    They start as the base's own for image states (Wan, image to video), or as the attention's where the width is equal.
    """

    def __init__(self, site: Site, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        of_image = "add_k_proj" in site.projections
        names = ("add_k_proj", "add_v_proj") if of_image else ("to_k", "to_v")
        self.to_k_ip, self.to_v_ip = (site.copy_of(name, from_width=width) for name in names)

    def project(self, tokens: Tensor) -> KV:
        return KV(self.to_k_ip(tokens), self.to_v_ip(tokens))

    def forward(self, qkv: QKV, image: KV | None) -> QKV:
        if image is None:
            return qkv
        return qkv.adding(self.scale * qkv.attended_image(image))
