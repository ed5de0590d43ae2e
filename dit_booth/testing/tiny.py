"""Tiny models for tests: every strategy on every kind of backbone, all parameters random, built in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dit_booth.components import Components
from dit_booth.config import STAGES, DataConfig, StageName, TrainConfig
from dit_booth.config.parse import config_class
from dit_booth.diffusion.objectives import make_objective
from dit_booth.inject import Dims, FirstFrame, Reference
from dit_booth.models.assemble import Backbone, BackboneConfig, assemble, build_backbone
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.autoencoder.model import build_autoencoder
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import ImageEncoder, Prompt, TextEncoder, build_clip
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.injected import Injected, Prediction
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.wan.model import WanConfig
from dit_booth.strategy import Strategy, StrategyConfig, find
from dit_booth.testing.template import Template
from dit_booth.training.stage import set_trainable, trainable_globs

FRAMES, SIZE = 3, 12
_DIT = DiTConfig(depth=2, hidden=32, heads=2)
BACKBONES: dict[str, dict[str, Any]] = {
    "dit-factorised": {"dit": _DIT},
    "dit-interleaved": {"dit": replace(_DIT, layout="interleaved")},
    "dit-joint": {"dit": replace(_DIT, layout="joint", plan="all")},
    "dit-cross_attention": {"dit": replace(_DIT, conditioning="cross_attention")},
    "unet": {
        "backbone": "unet",
        "unet": UNetConfig(
            channels=(8, 16), norm_groups=4, heads=2, layers_per_block=1, down_attention=(True, False)
        ),
    },
    "wan": {"backbone": "wan", "wan": WanConfig(depth=2, hidden=32, heads=2, ffn=64)},
}
"""Settings of the tiny backbones: every layout, with text attention and without."""


@dataclass
class Trial:
    """A tiny model with strategies, and the inputs of one step: two videos with captions that name their subject."""

    components: Components
    x: Tensor
    t: Tensor
    prompt: Prompt

    @property
    def known(self) -> Tensor:
        """The known frames (b f 1 1 1), for strategies that tell the network: the first."""
        mask = torch.zeros_like(self.x[:, :, :1, :1, :1])
        mask[:, 0] = 1
        return mask

    @property
    def model(self) -> Injected:
        return self.components.model

    @property
    def classes(self) -> Mapping[str, type[Strategy]]:
        return find(self.components.config.strategy)

    @property
    def stages(self) -> list[StageName]:
        """Return the stages in which one of the strategies trains parameters."""
        return [s for s in STAGES if any(s in self.model.strategy.part(n).stages() for n in self.classes)]

    def reference(self, seed: int = 0, batch: int = 2) -> Reference:
        """Encode and noise random images, drawn with `seed`: ``data.image_prompts`` of each row."""
        generator = torch.Generator().manual_seed(100 + seed)
        first = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
        shape = (batch, self.components.config.data.image_prompts - 1, 3, SIZE, SIZE)
        further = torch.rand(shape, generator=torch.Generator().manual_seed(200 + seed)) * 2 - 1
        images = torch.cat([first[:, None], further], dim=1)
        reference = self.components.reference(images, torch.float32)
        reference = self.components.with_first_frame(reference, FRAMES, *self.x.shape[-2:])
        copies = self.components.copies(reference)
        noise = torch.randn(copies.shape, generator=generator)
        return replace(reference, noisy=0.6 * copies + 0.8 * noise)

    def predict(self, reference: Reference | None) -> Prediction:
        prediction: Prediction = self.model(self.x, self.t, self.prompt, reference, known=self.known)
        return prediction

    def __call__(self, reference: Reference | None) -> Tensor:
        return self.predict(reference).output

    def plain(self) -> Tensor:
        """Return the prediction of the backbone without any strategy."""
        output: Tensor = self.model.backbone(self.x, self.t, self.model.text(self.prompt))
        return output

    def row(self, i: int) -> tuple[Tensor, Tensor, Prompt, Reference, None, Tensor]:
        """Return the arguments of the network for one of the videos."""
        rows = slice(i, i + 1)
        mine = rows_of(self.reference(), rows)
        prompt = self.prompt.each(lambda y: y[rows])
        return self.x[rows], self.t[rows], prompt, mine, None, self.known[rows]

    def train_in(self, stage: StageName) -> dict[str, nn.Parameter]:
        """Make a stage's parameters trainable, with all strategies active; return them by name."""
        globs = trainable_globs(self.components.config, self.model, stage, tuple(self.classes))
        return set_trainable(self.model, globs)

    def wanted(self) -> list[Tensor]:
        """Return the tensors to differentiate by: the parameters of the last stage, or else x."""
        parameters: list[Tensor] = [p for stage in self.stages[-1:] for p in self.train_in(stage).values()]
        return parameters or [self.x.requires_grad_()]

    def perturb(self) -> Trial:
        """Add a little noise to the strategies' parameters: a zero-initialised layer would stop gradients."""
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.model.strategy.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        return self


def rows_of(reference: Reference, rows: slice) -> Reference:
    """Return some rows of a reference."""
    first = reference.first_frame
    return Reference(
        image=reference.image[rows],
        states=tuple(state[rows] for state in reference.states),
        embedding=reference.embedding[rows],
        latent=reference.latent[rows],
        noisy=None if reference.noisy is None else reference.noisy[rows],
        further=tuple(rows_of(each, rows) for each in reference.further),
        first_frame=None if first is None else FirstFrame(first.latent[rows], None),
    )


def trial(
    strategy: str,
    backbone: str = "dit-factorised",
    seed: int = 0,
    options: Mapping[str, StrategyConfig] | None = None,
    image_prompts: int = 1,
    **settings: Any,
) -> Trial:
    """Build strategies on one of `BACKBONES`; `settings` are fields of `RunConfig` that replace that backbone's."""
    text, image_encoder = _text().copy(), _clip()[1]
    config = config_class(strategy)(
        strategy=strategy,
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=SIZE, frames=FRAMES, image_prompts=image_prompts),
        train=TrainConfig(seed=seed),
        **{**BACKBONES[backbone], **settings, **(options or {})},
    )
    autoencoder = build_autoencoder(config.autoencoder)
    body = _body(config.network, autoencoder.channels).copy()
    dims = Dims(image_encoder.width, image_encoder.embed_dim, autoencoder.channels, FRAMES)
    model = assemble(body, text, strategy, dims, options=config.options())
    components = Components(config, model, autoencoder, image_encoder, make_objective(config.objective))
    x = torch.randn(
        2, FRAMES, autoencoder.channels, SIZE // 3, SIZE // 3, generator=torch.Generator().manual_seed(9)
    )
    prompt = text.tokenize(["a dog runs", "the red cat and a cat"], ["dog", "cat"])
    return Trial(components, x, torch.tensor([40.0, 700.0]), prompt)


@cache
def _clip() -> tuple[TextEncoder, ImageEncoder]:
    torch.manual_seed(0)
    return build_clip(ClipConfig(pretrained="none"))


@cache
def _text() -> Template[TextEncoder]:
    return Template(_clip()[0])


@cache
def _body(config: BackboneConfig, channels: int) -> Template[Backbone]:
    """Build a backbone with every parameter random, once: trials copy it."""
    text, _ = _clip()
    torch.manual_seed(0)
    body = build_backbone(config, channels=channels, text_dim=text.width, text_embed_dim=text.embed_dim)
    _fill_zeros(body)
    return Template(body)


@torch.no_grad()
def _fill_zeros(backbone: nn.Module) -> None:
    """Fill zero-initialised parameters with noise: strategies shall meet a backbone as training leaves it."""
    generator = torch.Generator().manual_seed(5)
    for p in backbone.parameters():
        noise = torch.randn(p.shape, generator=generator)
        if not p.any():
            p.copy_(0.1 * noise)


def worst(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference."""
    return (a - b).abs().max().item()
