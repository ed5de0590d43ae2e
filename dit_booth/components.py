"""From a configuration to the parts of a run: encoders, backbone, strategies, objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dit_booth.config import RunConfig
from dit_booth.data.example import VideoDataset
from dit_booth.data.readers.triplets import check_caption
from dit_booth.diffusion.noise import Generators
from dit_booth.diffusion.objectives import Objective, make_objective
from dit_booth.inject import Reference
from dit_booth.models.autoencoder.model import Autoencoder, build_autoencoder
from dit_booth.models.clip.encoders import NULL_PROMPT, ImageEncoder, Prompt, build_clip
from dit_booth.models.clip.tokenizer import check_subject
from dit_booth.models.dit.model import VideoDiT
from dit_booth.models.fingerprint import warn_of_another_base
from dit_booth.models.injected import Injected, gather_sites
from dit_booth.models.pretrained import load_pretrained, load_strategy_weights, read_strategy_weights
from dit_booth.models.unet.model import VideoUNet
from dit_booth.strategy import create, find


@dataclass
class Components:
    """What a run is made of. Only `model` trains; the others are frozen and hold no state."""

    config: RunConfig
    model: Injected
    autoencoder: Autoencoder
    image_encoder: ImageEncoder
    objective: Objective
    sourced: frozenset[str] = frozenset()
    """The strategies' parameters that `weights` or `strategy_weights` had; the others are at their start."""

    def to(self, device: torch.device) -> Components:
        for module in (self.model, self.autoencoder, self.image_encoder):
            module.to(device)
        return self

    @property
    def first_token_suffices(self) -> bool:
        """Whether a caption needs no more of its subject than the first token, as the active strategies find it."""
        return self.model.strategy.first_token_suffices(self.model.active)

    def tokenize(self, captions: Sequence[str], subjects: Sequence[str | None]) -> Prompt:
        """Captions and their subjects for the network. ValueError: a caption without its subject (`Tokenizer`)."""
        return self.model.text.tokenize(captions, subjects, first_token_suffices=self.first_token_suffices)

    def dataset(self, *, heldout: bool) -> VideoDataset:
        """The run's data set, whose captions have what `tokenize` asks for. ValueError: a broken example."""
        by_token = partial(check_subject, first_token_suffices=True)
        check = by_token if self.first_token_suffices else check_caption
        return self.config.data.build(heldout=heldout, check=check)

    @torch.no_grad()
    def reference(self, images: Tensor, dtype: torch.dtype, generator: Generators | None = None) -> Reference:
        """Image prompts (b 3 s s) as strategies see them; `noisy` holds clean copies until they are noised.

        `generator` draws from an autoencoder's posterior; without one, the latent is torch's global generator's.
        """
        seen = self.image_encoder(images)
        latent = self.autoencoder.encode(images.unsqueeze(1), generator).to(dtype)
        copies = self.model.strategy.reference_frames(self.model.active)
        return Reference(
            image=images,
            states=tuple(state.to(dtype) for state in seen.states),
            embedding=seen.embedding.to(dtype),
            latent=latent,
            noisy=latent.expand(-1, copies, -1, -1, -1),
        )


def build(config: RunConfig) -> Components:
    """All parts on the CPU, seeded; the backbone from `config.weights`, strategies warm-started from it.

    Then the strategies take what `config.weights` has for them, and what `config.strategy_weights` have, in order.
    """
    torch.manual_seed(config.train.seed)
    text, image_encoder = build_clip(config.clip)
    autoencoder = build_autoencoder(config.autoencoder)
    backbone = build_backbone(config, autoencoder.channels, text.width, text.embed_dim)
    taps = load_pretrained(backbone, text, config.weights, config.backbone)
    sites = gather_sites(
        backbone,
        text,
        image_dim=image_encoder.width,
        image_embed_dim=image_encoder.embed_dim,
        latent_channels=autoencoder.channels,
        frames=config.data.frames,
    )
    strategy = create(find(config.strategy), config.options(), sites, config.train.seed)
    sourced = load_strategy_weights(strategy, taps, f"weights={config.weights}", optional=True)
    for source in config.strategy_weights:
        warn_of_another_base(source, backbone, strategy)
        sourced |= load_strategy_weights(
            strategy, read_strategy_weights(source), f"strategy_weights {source}"
        )
    model = Injected(backbone, text, strategy, text.tokenize([NULL_PROMPT]))
    return Components(config, model, autoencoder, image_encoder, make_objective(config.objective), sourced)


def build_backbone(
    config: RunConfig, channels: int, text_dim: int, text_embed_dim: int
) -> VideoDiT | VideoUNet:
    """The backbone with random weights; its channels and text widths are those of the encoders."""
    if config.backbone == "dit":
        return VideoDiT(config.dit, channels=channels, text_dim=text_dim, text_embed_dim=text_embed_dim)
    return VideoUNet(
        dataclasses.replace(config.unet, in_channels=channels, out_channels=channels, text_dim=text_dim)
    )
