"""Tiny runs for the contracts: a backbone whose zero-initialised parameters are random, and an image."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth import components as building
from dit_booth.components import Components, build
from dit_booth.config import DataConfig, RunConfig, TrainConfig
from dit_booth.config.parse import config_class
from dit_booth.inject import Reference
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import Prompt
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.weights import write
from dit_booth.strategy import StrategyConfig

torch.set_num_threads(1)
FRAMES, SIZE = 3, 12
UNET = UNetConfig(channels=(8, 16), norm_groups=4, heads=2, layers_per_block=1, down_attention=(True, True))
Make = Callable[..., "Run"]


@dataclasses.dataclass
class Run:
    """Components, and the arguments of one step: two videos with captions that name their subject."""

    components: Components
    x: Tensor
    t: Tensor
    prompt: Prompt

    @property
    def root(self) -> Any:
        return self.components.model

    def reference(self, seed: int = 0, batch: int = 2) -> Reference:
        generator = torch.Generator().manual_seed(100 + seed)
        images = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
        reference = self.components.reference(images, torch.float32)
        noise = torch.randn(reference.latent.shape, generator=generator)
        return dataclasses.replace(reference, noisy=0.6 * reference.latent + 0.8 * noise)

    def __call__(self, reference: Reference | None) -> Tensor:
        return self.model(self.x, self.t, self.prompt, reference).output

    def plain(self) -> Tensor:
        """The backbone without any strategy."""
        return self.model.backbone(self.x, self.t, self.model.text(self.prompt))


def randomised(kind: str) -> dict[str, Tensor]:
    """A backbone and its text encoder with nothing at zero, under the names of a weights file."""
    root = build(_config("none", kind, "none", 0)).model
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, p in root.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        state[name] = p.detach() if p.any() else 0.1 * noise
    return state


def _config(strategy: str, backbone: str, weights: str, seed: int, **more: Any) -> RunConfig:
    return config_class(strategy)(
        strategy=strategy,
        backbone=backbone,
        weights=weights,
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=SIZE, frames=FRAMES),
        train=TrainConfig(seed=seed),
        **({"unet": UNET} | more),
    )


@pytest.fixture(scope="session")
def clip() -> Any:
    torch.manual_seed(0)
    return building.build_clip(ClipConfig(pretrained="none"))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The start weights of both backbones: strategies warm-start from them as from a real base."""
    folder = tmp_path_factory.mktemp("weights")
    for kind in ("dit", "unet"):
        write(folder / f"{kind}.safetensors", randomised(kind))
    return {kind: folder / f"{kind}.safetensors" for kind in ("dit", "unet")}


@pytest.fixture
def make(clip: Any, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Make:
    """make(strategy, backbone, seed=0, options={name: config}, **fields of RunConfig)."""
    text, images = clip
    monkeypatch.setattr(building, "build_clip", lambda config: (copy.deepcopy(text), images))

    def make(
        strategy: str,
        backbone: str,
        seed: int = 0,
        options: dict[str, StrategyConfig] | None = None,
        **more: Any,
    ) -> Run:
        config = _config(strategy, backbone, str(files[backbone]), seed, **(options or {}), **more)
        components = build(config)
        generator = torch.Generator().manual_seed(9)
        latents = (2, FRAMES, components.autoencoder.channels, SIZE // 3, SIZE // 3)
        x = torch.randn(latents, generator=generator)
        prompt = components.model.text.tokenize(["a dog runs", "the red cat and a cat"], ["dog", "cat"])
        return Run(components, x, torch.tensor([40.0, 700.0]), prompt)

    return make
