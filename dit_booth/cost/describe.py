"""Sizes of networks: parameters, and the multiply-adds and FLOPs of one forward pass.

A multiply-add is two FLOPs; the DiT paper's "Gflops" are multiply-adds. Counted are matrix products, convolutions and
attention, one video at a time, on the meta device: nothing is computed, no weights are loaded. Text and image encoder
are not counted; their widths are those of CLIP ViT-L/14, and of umT5-XXL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dit_booth.config import RunConfig
from dit_booth.cost.flops import Flops
from dit_booth.inject import Dims, FirstFrame, Injection, Reference, Site, no_injection
from dit_booth.models.assemble import assemble, build_backbone
from dit_booth.models.clip.encoders import ClipConfig, Prompt, Text, TextEncoder
from dit_booth.models.clip.weights import model_settings
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.injected import Injected
from dit_booth.models.text.config import TextConfig
from dit_booth.strategy import find

Latents = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Sizes of CLIP's towers; these are ViT-L/14's."""

    text: int = 768
    tokens: int = 77
    image: int = 1024
    patches: int = 257
    """Tokens of the image tower, the class token included."""
    common: int = 768
    """Width of the space that both towers end in."""

    @classmethod
    def of(cls, clip: ClipConfig) -> Encoders:
        """Return the sizes of a configuration's model by its name; ViT-L/14's for a folder of weights."""
        settings = model_settings(clip.model)
        if clip.pretrained.startswith("local-dir:") or settings is None:
            return cls()
        text, vision = settings["text_cfg"], settings["vision_cfg"]
        return cls(
            text=text["width"],
            tokens=text.get("context_length", cls.tokens),
            image=vision["width"],
            patches=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            common=settings["embed_dim"],
        )

    def reading(self, text: TextConfig) -> Encoders:
        """Return a copy with the text encoder of a section: CLIP's as it is, or umT5-XXL."""
        return self if text.kind == "clip" else replace(self, text=UMT5_XXL, tokens=text.length)


VIT_L_14 = Encoders()
UMT5_XXL = 4096
"""Width of its states."""
VIT_H_14_TOKENS = 257
"""Image states that Wan's image-to-video weights read of CLIP."""


@dataclass(frozen=True)
class ForwardCost:
    """Parameters, and multiply-adds of one forward pass."""

    parameters: int
    multiply_adds: int

    @property
    def flops(self) -> int:
        return 2 * self.multiply_adds

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:9.2f} M parameters {self.multiply_adds / 1e9:10.2f} G multiply-adds"
            f" {self.flops / 1e9:10.2f} GFLOPs"
        )


def table_of_sizes(latents: Latents) -> list[str]:
    """Return a line for each DiT size, on one image: class labels, and a predicted variance."""
    lines = [
        "{} x {} x {} latents, one image with a class label (DiT, table 1 and figure 2)".format(*latents)
    ]
    for size in ("nano", "S", "B", "L", "XL"):
        for patch in (2, 4, 8):
            if not (latents[1] % patch or latents[2] % patch):
                lines.append(f"DiT-{f'{size}/{patch}':7} {image_cost(size, patch, latents)}")
    return lines


def image_cost(
    size: Literal["nano", "S", "B", "L", "XL"], patch: Literal[1, 2, 4, 8], latents: Latents = (4, 32, 32)
) -> ForwardCost:
    """Compute the cost of a DiT as published: one image, a class label, a predicted variance."""
    config = DiTConfig(size=size, patch=patch, layout="image", plan="self", conditioning="class_label")
    with torch.device("meta"):
        dit = VideoDiT(config, channels=latents[0], out_channels=2 * latents[0], text_dim=1, text_embed_dim=1)
        x, label = torch.empty(1, 1, *latents), torch.zeros(1, dtype=torch.long)
        return cost_of(dit, lambda: dit(x, torch.zeros(1), label))


def table_of_run(config: RunConfig, latents: Latents) -> list[str]:
    """Return the costs of the backbone alone and with strategies and an image (the reference pass included)."""
    frames, names = config.latent_frames, find(config.strategy)
    encoders = VIT_L_14.reading(config.text)
    model = build(config, latents, encoders=encoders).requires_grad_(False)
    shape = (1, frames, *latents)

    def alone() -> Tensor:
        x, t, words = inputs(shape, encoders=encoders)
        out: Tensor = model.backbone(x, t, model.text(words, no_injection))
        return out

    lines = [
        f"{config.backbone}, {frames} frames of {{}} x {{}} x {{}} latents, one video".format(*latents),
        f"{'backbone':40} {cost_of(model.backbone, alone)}",
    ]
    if list(model.strategy.parameters()) or any(model.strategy.part(name).reads_image for name in names):
        copies = model.strategy.reference_frames(tuple(names))
        width, images = config.image_states_width, config.data.image_prompts
        image = reference(shape, copies=copies, images=images, image_dim=width)
        both = cost_of(model, lambda: model(*inputs(shape, encoders=encoders), image))
        lines.append(f"{'with ' + config.strategy:40} {both}")
    return lines


def cost_of(module: nn.Module, forward: Callable[[], Any]) -> ForwardCost:
    """Return a module's parameters and the multiply-adds of `forward`."""
    with torch.no_grad(), Flops() as counter:
        forward()
    return ForwardCost(sum(p.numel() for p in module.parameters()), counter.total // 2)


# ---- a run's network without its encoders ------------------------------------------------------------------

Device = torch.device | str


class GivenText(nn.Module):
    """Stands in for the text tower: random outputs, on the device and of the dtype of its buffer."""

    like: Tensor
    null_prompt = ""

    def __init__(self, encoders: Encoders) -> None:
        super().__init__()
        self.encoders = encoders
        self.trains = False
        """True if the tower trains, so that its outputs need gradients."""
        self.site = Site(name="text.prompt", port="prompt", role="words", dim=encoders.text)
        self.register_buffer("like", torch.zeros(()))

    def sites(self) -> list[Site]:
        return [self.site]

    def tokenize(self, captions: Sequence[str]) -> Prompt:
        return prompt(len(captions), self.like.device, self.encoders.tokens)

    def forward(self, prompt: Prompt, inject: Injection) -> Text:
        rows, e = len(prompt.ids), self.encoders
        out = Text(*(self.like.new_empty(rows, *n).normal_() for n in ((e.tokens, e.text), (e.common,))))
        if (self.trains or self.site.name in inject.taps) and torch.is_grad_enabled():
            for x in out:
                x.requires_grad_()  # a strategy that changes words has its gradient through the whole backbone
        return out


def build(
    config: RunConfig, latents: Latents, device: Device = "meta", encoders: Encoders = VIT_L_14
) -> Injected:
    """Build the run's backbone and strategies with random weights, and a stub for the text tower."""
    with torch.device(device):
        backbone = build_backbone(
            config.network, channels=latents[0], text_dim=encoders.text, text_embed_dim=encoders.common
        )
        text = cast(TextEncoder, GivenText(encoders))
        dims = Dims(encoders.image, encoders.common, latents[0], config.latent_frames)
        return assemble(backbone, text, config.strategy, dims, options=config.options())


def prompt(batch: int, device: Device, tokens: int = VIT_L_14.tokens) -> Prompt:
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=device)
    return Prompt.without_subject(ids)


def inputs(
    shape: Sequence[int],
    device: Device = "meta",
    dtype: torch.dtype = torch.float32,
    encoders: Encoders = VIT_L_14,
) -> tuple[Tensor, Tensor, Prompt]:
    """Return noisy latents of `shape` (b f c h w), timesteps, prompts."""
    x = torch.randn(*shape, device=device, dtype=dtype)
    return x, torch.full((shape[0],), 500.0, device=device), prompt(shape[0], device, encoders.tokens)


def reference(
    shape: Sequence[int],
    device: Device = "meta",
    dtype: torch.dtype = torch.float32,
    copies: int = 1,
    encoders: Encoders = VIT_L_14,
    images: int = 1,
    image_dim: int = 0,
) -> Reference:
    """Return random image prompts, `images` for each video of `shape` (b f c h w), of the video's size.

    image_dim: width of the states that image-to-video weights read; 0: none.
    """
    b, f, c, h, w = shape
    options: Any = {"device": device, "dtype": dtype}
    first = Reference(
        image=torch.ones(b, 3, 8 * h, 8 * w, **options),
        states=tuple(torch.randn(b, encoders.patches, encoders.image, **options) for _ in range(5)),
        embedding=torch.randn(b, encoders.common, **options),
        latent=torch.randn(b, 1, c, h, w, **options),
        noisy=torch.randn(b, copies, c, h, w, **options),
        first_frame=FirstFrame(
            torch.randn(b, f, c, h, w, **options),
            torch.randn(b, VIT_H_14_TOKENS, image_dim, **options) if image_dim else None,
        ),
    )
    return replace(first, further=(first,) * (images - 1))
