"""`Injected`: backbone, text encoder and strategies as one module, the only one that DeepSpeed sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Clip
from dit_booth.inject import (
    AuxPrediction,
    Condition,
    Hidden,
    Injection,
    Noise,
    Recorder,
    Reference,
    Site,
    timestep_of_reference,
)
from dit_booth.models.clip.encoders import Prompt, Text
from dit_booth.models.text.build import AnyTextEncoder
from dit_booth.models.wan.model import VideoWan
from dit_booth.strategy import Strategies


class Prediction(NamedTuple):
    """The network's prediction (b f c h w), the auxiliary loss (a scalar), and a prediction beside the video."""

    output: Tensor
    aux_loss: Tensor
    aux_prediction: AuxPrediction | None = None


class Injected(nn.Module):
    """x (b f c h w) at timestep t (b,) or, one per frame, (b f), a prompt and a reference -> `Prediction`.

    `null` is the tokenised null prompt (one row), the text of the reference's own pass.
    """

    null_ids: Tensor

    def __init__(self, backbone: nn.Module, text: AnyTextEncoder, strategy: Strategies, null: Prompt) -> None:
        super().__init__()
        self.backbone, self.text, self.strategy = backbone, text, strategy
        self.active: tuple[str, ...] = strategy.names
        self.register_buffer("null_ids", null.ids, persistent=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        prompt: Prompt,
        reference: Reference | None = None,
        constant: Mapping[str, Condition] | None = None,
        known: Tensor | None = None,
        clip: Clip | None = None,
    ) -> Prediction:
        """Predict; `constant` holds conditions of this reference made before (`constant_conditions`).

        known: b f 1 1 1, 1 in frames of x that are known, for strategies that tell the network.
        clip: the frames of x in a longer video, and the cache of earlier ones; none: x is the whole video.
        """
        conditions = dict(constant or {})
        if reference is not None:
            names = [name for name in self.active if name not in conditions]
            conditions |= self.conditions(timestep_of_reference(t), reference, names)
        inject = self.strategy.bind(self.active, conditions, known, clip or Clip(range(x.shape[1])))
        output = self.backbone(x, t, self.read(prompt, inject, x.dtype), inject)
        aux_losses = [c.aux_loss for c in conditions.values() if c.aux_loss is not None]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else output.new_zeros(())
        return Prediction(output, aux_loss, inject.aux_prediction)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the latents that the backbone takes: that of the layer that embeds them."""
        entry: Site = self.backbone.entry  # type: ignore[assignment]
        assert entry.embed is not None, "an entry site names the layer that embeds the latents"
        return entry.embed.weight.dtype

    def to_precision(self, dtype: torch.dtype) -> Self:
        """Cast backbone and strategies, but for the parts of Wan that its release keeps in float32."""
        if isinstance(self.backbone, VideoWan):
            self.backbone.to_precision(dtype)
        else:
            self.backbone.to(dtype)
        self.strategy.to(dtype)
        return self

    def read(self, prompt: Prompt, inject: Injection, dtype: torch.dtype) -> Text:
        """Encode a prompt in the latents' dtype: DeepSpeed casts parameters, and umT5 is none of them."""
        return Text(*(states.to(dtype) for states in self.text(prompt, inject)))

    def conditions(self, t: Tensor, reference: Reference, names: Sequence[str]) -> dict[str, Condition]:
        """Record what the named strategies need at timestep t (b,), and make their conditions of it."""
        hidden = self.record(t, reference, names)
        made: dict[str, Condition] = self.strategy(replace(reference, noisy=None), hidden, names)
        return made

    def constant_conditions(self, reference: Reference) -> dict[str, Condition]:
        """Make the active strategies' conditions that are the same at every timestep."""
        names = [name for name in self.active if self.strategy.needs[name].constant]
        return self.conditions(reference.latent.new_zeros(len(reference.latent)), reference, names)

    def record(self, t: Tensor, reference: Reference, names: Sequence[str]) -> dict[Noise, Hidden]:
        """Run one pass of the reference for each kind of noise that the named strategies need."""
        needs = [self.strategy.needs[name] for name in names]
        hidden: dict[Noise, Hidden] = {}
        kinds: tuple[Noise, ...] = ("matched", "clean")
        for noise in kinds:
            sites = [site for need in needs if need.noise == noise for site in need.sites]
            if sites:
                latent = reference.latent if noise == "clean" else reference.noisy
                assert latent is not None, "a strategy needs the reference noised; set Reference.noisy"
                hidden[noise] = self.hidden(latent, torch.zeros_like(t) if noise == "clean" else t, sites)
        return hidden

    def hidden(self, latent: Tensor, t: Tensor, sites: Sequence[str]) -> Hidden:
        """Run latents (b r c h w) as a video with null text; return the first frame's hidden states at `sites`.

        One frame is enough: further ones (r > 1) reach the first through norms and temporal attention only.
        The taps stay active without an image: the reference meets the trained keys and values
        (in the golden tensors the reference's pass uses them too).
        """
        recorder = Recorder(self.strategy.bind(self.active, of_reference=True), sites)
        null = Prompt.without_subject(self.null_ids.expand(len(latent), -1))
        self.backbone(latent, t, self.read(null, recorder, latent.dtype), recorder)
        frames = latent.shape[1]
        return {
            site: rearrange(state, "b (r m) c -> b r m c", r=frames)[:, 0]
            for site, state in recorder.hidden.items()
        }
