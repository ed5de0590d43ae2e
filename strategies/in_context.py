"""In context: every image prompt is one more frame beside the video (Phantom, arXiv 2502.11079; HunyuanCustom)."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dit_booth.inject import Condition, Hidden, Latents, Reference, Sites
from dit_booth.strategy import AnchoredConfig, Strategy, register

from .parts.frames import latents_of, resized

Place = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class InContextConfig(AnchoredConfig):
    place: Place = "before"
    """Times of the references: before the video's (HunyuanCustom), or after them (Phantom's and SkyReels-V3's code)."""
    one_way: bool = True
    """The reference reads only itself; false: it reads the video, too."""

    def __post_init__(self) -> None:
        self.check_anchors("in_context")
        if self.place not in (places := get_args(Place)):
            raise ValueError(f"in_context.place is {self.place!r}; choose one of {', '.join(places)}")


@register("in_context")
class InContext(Strategy):
    """Each clean reference is a frame beside the video, at a time of its own, that every frame may read (Phantom)."""

    Config = InContextConfig
    trains_backbone = {"fine": ("*.attn1.*",), "joint": ("*.attn1.*",)}
    excludes = ("kv_concat", "spatial_concat")  # the first counts frames from the video's first one
    reads_all_images = True

    def __init__(self, config: InContextConfig, sites: Sites) -> None:
        super().__init__(config, sites)
        (entry,), (leaving,) = (sites.match("*", port="latents", role=role) for role in ("entry", "exit"))
        self.attach(entry, Prepend(config.one_way, config.place))
        self.attach(leaving, Drop())

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=latents_of(reference))  # b r c h w


class Prepend(nn.Module):
    """Concatenate [references; frames] along the frame axis; `place`: the references' times."""

    def __init__(self, one_way: bool, place: Place) -> None:
        super().__init__()
        self.one_way, self.place = one_way, place

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        if image is None:
            return latents
        return replace(
            latents,
            x=torch.cat([resized(image, latents.x), latents.x], dim=1),
            context=image.shape[1],
            context_after=image.shape[1] if self.place == "after" else 0,
            one_way=self.one_way,
            context_readers=latents.readers,
        )


class Drop(nn.Module):
    """Remove the reference frames."""

    def forward(self, latents: Latents, image: Tensor | None) -> Latents:
        return replace(latents, x=latents.x[:, latents.context :], context=0)
