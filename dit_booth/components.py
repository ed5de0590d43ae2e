"""From a configuration to the components of a run: encoders, backbone with strategies, objective."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dit_booth.config import RunConfig, StageName
from dit_booth.data.example import VideoDataset
from dit_booth.data.image_prompt import cut_to_aspect, resized_to, shows_subject
from dit_booth.data.readers.item import check_caption
from dit_booth.data.subject import insert_before
from dit_booth.data.toyworld import Split
from dit_booth.diffusion.noise import Generators
from dit_booth.diffusion.objectives import Objective, make_objective
from dit_booth.inject import Dims, FirstFrame, Reference
from dit_booth.models.assemble import assemble, build_backbone
from dit_booth.models.autoencoder.model import Autoencoder, build_autoencoder
from dit_booth.models.clip.encoders import ImageEncoder, Prompt, build_clip
from dit_booth.models.clip.tokenizer import check_subject
from dit_booth.models.fingerprint import metadata, warn_of_another_base
from dit_booth.models.injected import Injected
from dit_booth.models.pretrained import load_pretrained, load_strategy_weights, read_strategy_weights
from dit_booth.models.text.build import build_text
from dit_booth.models.wan.image_encoder import WanImageEncoder
from dit_booth.models.weights import part, write
from dit_booth.strategy import Strategies

log = logging.getLogger(__name__)


@dataclass
class Components:
    """All that a run is made of. Only `model` trains; the others are frozen and hold no state.

    The autoencoder and the image encoder of a run on encoded data (`data.cache`) are built when they are first used.
    """

    config: RunConfig
    model: Injected
    built_autoencoder: Autoencoder | None
    built_image_encoder: ImageEncoder | None
    objective: Objective
    loaded: frozenset[str] = frozenset()
    """Names of the strategies' parameters that `weights` or `strategy_weights` had; others are at their start."""
    interpolator: Components | None = None
    """A model of its own for the clips between predicted frames (LVDM); none: this one. Autoencoders must be equal."""
    state_encoder: WanImageEncoder | None = None
    """Makes the states that image-to-video weights read, where a strategy passes them on."""

    def to(self, device: torch.device) -> Self:
        """Move all components to a device, in place."""
        for module in (self.model, self.built_autoencoder, self.built_image_encoder, self.state_encoder):
            if module is not None:
                module.to(device)
        return self

    @property
    def autoencoder(self) -> Autoencoder:
        if self.built_autoencoder is None:
            self.built_autoencoder = build_autoencoder(self.config.autoencoder_source).to(self.device)
        return self.built_autoencoder

    @property
    def image_encoder(self) -> ImageEncoder:
        if self.built_image_encoder is None:
            self.built_image_encoder = build_clip(self.config.clip)[1].to(self.device)
        return self.built_image_encoder

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def first_token_suffices(self) -> bool:
        """True if a caption needs only the first token of its subject, as the active strategies find it."""
        return self.model.strategy.first_token_suffices(self.model.active)

    def tokenize(self, captions: Sequence[str], subjects: Sequence[str | None]) -> Prompt:
        """Tokenize captions and mark their subjects, DreamBooth's rare token before them where the run has one.

        ValueError: a caption without its subject (`Tokenizer`).
        """
        if token := self.config.subject.token:
            captions = [
                insert_before(caption, subject, token)
                for caption, subject in zip(captions, subjects, strict=True)
            ]
        return self.model.text.tokenize(captions, subjects, first_token_suffices=self.first_token_suffices)

    def dataset(self, split: Split = "train", frames: int = 0) -> VideoDataset:
        """Open a split of the run's data, whose captions have what `tokenize` needs. ValueError: a broken example.

        frames: of its videos; 0: as in the run.
        """
        data = replace(self.config.data, frames=frames or self.config.data.frames)
        by_token = partial(check_subject, first_token_suffices=True)
        check = by_token if self.first_token_suffices else check_caption
        return data.build(split, check)

    def check_images(self, images: Tensor, names: Sequence[str]) -> None:
        """Check that image prompts (b 3 s s, or b r 3 s s) show a subject, where an active strategy reads them.

        ValueError: one is all white; it says which, by its name.
        """
        if not any(self.model.strategy.part(name).reads_image for name in self.model.active):
            return
        for place, column in enumerate(columns(images)):
            which = f", number {place + 1}," if place else ""
            for name, shown in zip(names, shows_subject(column).tolist(), strict=True):
                if not shown:
                    raise ValueError(
                        f"the image prompt of {name}{which} is all white; give a picture that shows the subject"
                    )

    def stage_data(self, stage: StageName, prior: Tensor | None = None) -> VideoDataset:
        """Open what a stage is trained on: the run's data, or its one subject (prior: class images, n f 3 h w)."""
        data = self.config.data
        if stage != "subject":
            return self.dataset()
        return self.config.subject.build(
            frames=data.frames, size=data.height_width, side=data.prompt_side, seed=data.seed, prior=prior
        )

    @torch.no_grad()
    def reference(self, images: Tensor, dtype: torch.dtype, generator: Generators | None = None) -> Reference:
        """Encode image prompts (b 3 s s, or b r 3 s s, in [-1, 1]) as strategies see them, without noise.

        `generator` draws from an autoencoder's posterior; without one, torch's global generator does.
        """
        first, *further = (self._reference(column, dtype, generator) for column in columns(images))
        return replace(first, further=tuple(further))

    def _reference(self, images: Tensor, dtype: torch.dtype, generator: Generators | None) -> Reference:
        seen = self.image_encoder(images)
        return Reference(
            image=images,
            states=tuple(state.to(dtype) for state in seen.states),
            embedding=seen.embedding.to(dtype),
            latent=self.autoencoder.encode(images.unsqueeze(1), generator).to(dtype),
        )

    @torch.no_grad()
    def with_first_frame(self, reference: Reference, frames: int, height: int, width: int) -> Reference:
        """Return the reference with its image as the first frame of a video of so many latent frames, rows and columns.

        As it is, if no active strategy reads that. The autoencoder's mode is taken: nothing is drawn.
        """
        if not self.model.strategy.reads_first_frame(self.model.active):
            return reference
        autoencoder, section = self.autoencoder, self.config.autoencoder
        size = height * autoencoder.factor, width * autoencoder.factor
        picture = cut_to_aspect(reference.image, *size)
        after = section.video_frames(frames) - 1 if section.frames_factor > 1 else 0
        video = F.pad(
            rearrange(resized_to(picture, *size), "b c h w -> b 1 c h w"), (0, 0, 0, 0, 0, 0, 0, after)
        )
        mode = replace(autoencoder.posterior, sample=False)
        latent = mode.draw(autoencoder.moments(video)).to(reference.latent)
        states = None if self.state_encoder is None else self.state_encoder(picture).to(reference.latent)
        return replace(reference, first_frame=FirstFrame(latent, states))

    def save_weights(self, folder: Path) -> None:
        """Write ``weights.safetensors`` (backbone, text encoder) and ``strategy.safetensors`` (the adapter).

        The adapter's metadata hold its base's fingerprint and the run's settings, from which `Pipeline.load` builds.
        """
        state = self.model.state_dict()
        write(
            folder / "weights.safetensors",
            {name: value for name, value in state.items() if not name.startswith("strategy.")},
        )
        write(folder / "strategy.safetensors", part(state, "strategy."), self.adapter_metadata())

    def adapter_metadata(self) -> dict[str, str]:
        """Return the metadata of the strategies' weights: options, base, and the settings to build it by."""
        settings = self.config.as_dict() | {"strategy_weights": [], "out": "", "store": "", "stop_after": ""}
        about = metadata(self.model.backbone, self.model.strategy)
        return {**about, "settings": json.dumps(settings)}

    def copies(self, reference: Reference) -> Tensor:
        """Return the clean latents (b r c h w) that are to be noised for the active strategies."""
        return reference.latent.expand(
            -1, self.model.strategy.reference_frames(self.model.active), -1, -1, -1
        )


def columns(images: Tensor) -> tuple[Tensor, ...]:
    """Return image prompts by their place: b 3 s s each, of b 3 s s or b r 3 s s."""
    return (images,) if images.ndim == 4 else images.unbind(1)


def warn_of_unread_images(count: int, strategies: Strategies) -> None:
    """Log the strategies that read the first of several image prompts alone."""
    parts = [strategies.part(name) for name in strategies.names]
    names = [part.name for part in parts if part.reads_image and not part.reads_all_images]
    if count > 1 and names:
        log.warning("data.image_prompts is %d; %s read the first one alone", count, ", ".join(names))


def build(config: RunConfig) -> Components:
    """Build all components on the CPU, seeded: the backbone from `config.weights`, strategies warm-started from it.

    Then the strategies take what `config.weights` has for them, and what `config.strategy_weights` have, in order.
    """
    torch.manual_seed(config.train.seed)
    clip_text, tower = build_clip(config.clip)
    text = build_text(config.text_source, clip_text)
    image_encoder: ImageEncoder | None = None
    autoencoder: Autoencoder | None = None
    if config.data.cache:
        width, embed_dim, channels = config.data.read_cache()["dims"]
    else:
        image_encoder, autoencoder = tower, build_autoencoder(config.autoencoder_source)
        width, embed_dim, channels = tower.width, tower.embed_dim, autoencoder.channels
    dims = Dims(width, embed_dim, channels, config.latent_frames)
    backbone = build_backbone(
        config.network, channels=dims.latent_channels, text_dim=text.width, text_embed_dim=text.embed_dim
    )
    taps = load_pretrained(backbone, text, config.weights, config.backbone)
    model = assemble(backbone, text, config.strategy, dims, options=config.options(), seed=config.train.seed)
    warn_of_unread_images(config.data.image_prompts, model.strategy)
    loaded = load_strategy_weights(model.strategy, taps, f"weights={config.weights}", optional=True)
    for source in config.strategy_weights:
        warn_of_another_base(source, backbone, model.strategy)
        loaded |= load_strategy_weights(
            model.strategy, read_strategy_weights(source), f"strategy_weights {source}"
        )
    objective, state_encoder = make_objective(config.objective), build_state_encoder(config, model.strategy)
    return Components(
        config, model, autoencoder, image_encoder, objective, loaded, state_encoder=state_encoder
    )


def build_state_encoder(config: RunConfig, strategies: Strategies) -> WanImageEncoder | None:
    """Build the encoder whose states image-to-video weights read, if a strategy passes them on.

    Such weights with no such strategy see zeros in the place of the image: a line in the log says so.
    """
    reads = strategies.reads_first_frame(strategies.names)
    if reads and config.image_states_width:
        return WanImageEncoder(config.image_encoder_source, config.image_states_width)
    if not reads and config.backbone == "wan" and config.wan.condition_channels:
        log.warning(
            "wan.condition_channels is %d: image-to-video weights, which see zeros without strategy image_to_video",
            config.wan.condition_channels,
        )
    return None
