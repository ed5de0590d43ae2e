"""In context: the reference is one more frame before the video (Phantom, arXiv 2502.11079; HunyuanCustom)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_booth.inject import Condition, Hidden, Latents, Reference, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register


@dataclass(frozen=True, kw_only=True)
class InContextConfig(AnchoredConfig):
    one_way: bool = True
    """The reference reads only itself; false: it reads the video, too."""

    def __post_init__(self) -> None:
        self.check_anchors("in_context")


@register("in_context")
class InContext(Strategy):
    """The clean reference is a frame before the video, at a time of its own, that every frame may read (Phantom)."""

    Config = InContextConfig
    trains_backbone = {"fine": ("*.attn1.*",), "joint": ("*.attn1.*",)}
    excludes = ("kv_concat", "spatial_concat")  # the first counts frames from the video's first one

    def __init__(self, config: InContextConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,), (leaving,) = (sites.match("*", port="latents", role=role) for role in ("entry", "exit"))
        self.attach(entry, Prepend(config.one_way))
        self.attach(leaving, Drop())

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=reference.latent)


class Prepend(nn.Module):
    """Concatenate [reference; frames] along the frame axis."""

    def __init__(self, one_way: bool) -> None:
        super().__init__()
        self.one_way = one_way

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        if image is None:
            return latents
        frame, x = image, latents.x
        if frame.shape[-2:] != x.shape[-2:]:  # a square image prompt before a wide video
            frame = F.interpolate(frame[:, 0], x.shape[-2:], mode="bilinear", antialias=True)[:, None]
        x = torch.cat([frame.to(x.dtype), x], dim=1)
        return replace(latents, x=x, context=1, one_way=self.one_way, context_readers=latents.readers)


class Drop(nn.Module):
    """Remove the reference frame."""

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        return replace(latents, x=latents.x[:, latents.context :], context=0)
