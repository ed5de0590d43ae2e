"""`Injected`: backbone, text encoder and strategies as one module, the only one that DeepSpeed sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.inject import AuxPrediction, Condition, Recorder, Reference, Sites
from dit_booth.models.clip.encoders import Prompt, TextEncoder
from dit_booth.models.dit.model import VideoDiT
from dit_booth.models.unet.model import VideoUNet
from dit_booth.strategy import Strategies


class Prediction(NamedTuple):
    """What the network predicts (b f c h w), the auxiliary loss (a scalar), a prediction beside the video."""

    output: Tensor
    aux_loss: Tensor
    aux_prediction: AuxPrediction | None = None


class Injected(nn.Module):
    """x (b f c h w) at timestep t (b,), a prompt and a reference -> `Prediction`.

    `null` is the tokenised null prompt (one row), the text of the reference's own pass.
    """

    null_ids: Tensor

    def __init__(self, backbone: nn.Module, text: TextEncoder, strategy: Strategies, null: Prompt) -> None:
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
        known: Mapping[str, Condition] | None = None,
    ) -> Prediction:
        """`known` are conditions of this reference that were made before (`lasting`)."""
        conditions: Mapping[str, Condition] = {name: Condition() for name in self.active}
        if reference is not None:
            known = known or {}
            made = self.conditions(t, reference, [name for name in self.active if name not in known])
            conditions = {**made, **known}
        inject = self.strategy.bind(conditions)
        output = self.backbone(x, t, self.text(prompt, inject), inject)
        aux_losses = [c.aux_loss for c in conditions.values() if c.aux_loss is not None]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else output.new_zeros(())
        return Prediction(output, aux_loss, inject.aux_prediction)

    def conditions(self, t: Tensor, reference: Reference, names: Sequence[str]) -> dict[str, Condition]:
        """What the named strategies make of the reference at timestep t (b,)."""
        reference = replace(reference, record=lambda *args: self.record(t, *args))
        made: dict[str, Condition] = self.strategy(reference, names)
        return made

    def lasting(self, reference: Reference) -> dict[str, Condition]:
        """The conditions that serve all timesteps: those of the active strategies that do not depend on time."""
        names = [name for name in self.active if not self.strategy.part(name).depends_on_time]
        return self.conditions(reference.latent.new_zeros(len(reference.latent)), reference, names)

    def record(self, t: Tensor, latent: Tensor, clean: bool, sites: Sequence[str]) -> Mapping[str, Tensor]:
        """Run the reference (b r c h w) as a video with null text; hidden states of its first frame at `sites`.

        One frame is enough: further ones (r > 1) reach the first through norms and temporal attention only.
        The taps stay active without a condition: the reference meets the trained keys and values, but no image
        (in the golden tensors the reference's pass uses them too).
        """
        recorder = Recorder(self.strategy.bind({name: Condition() for name in self.active}), sites)
        ids = self.null_ids.expand(len(latent), -1)
        text = self.text(Prompt.without_subject(ids), recorder)
        self.backbone(latent, torch.zeros_like(t) if clean else t, text, recorder)
        frames = latent.shape[1]
        return {
            site: rearrange(hidden, "b (r m) c -> b r m c", r=frames)[:, 0]
            for site, hidden in recorder.hidden.items()
        }


def gather_sites(
    backbone: VideoDiT | VideoUNet,
    text: TextEncoder,
    *,
    image_dim: int,
    image_embed_dim: int,
    latent_channels: int,
    frames: int,
) -> Sites:
    """The sites of the whole model: the text encoder's, then the backbone's."""
    return Sites((*text.sites(), *backbone.sites()), image_dim, image_embed_dim, latent_channels, frames)
