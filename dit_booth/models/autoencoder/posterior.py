"""From what an autoencoder's encoder says about a frame to the latents that are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

Draws = torch.Generator | Sequence[torch.Generator] | None
"""Random generators: one for the batch, one per row, or torch's global one."""


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """How latents are made of moments; `Autoencoder.moments` gives those, and a cache of encoded data keeps them.

    kl: the moments are mean and log variance of a Gaussian (b f 2c h w), else the latents themselves (b f c h w).
    sample: draw from the Gaussian, else take its mean. scale, shift: latents = (z - shift) * scale; for all channels,
    or one value for each.
    """

    kl: bool = False
    sample: bool = False
    scale: float | Sequence[float] = 1.0
    shift: float | Sequence[float] = 0.0

    def draw(self, moments: Tensor, generator: Draws = None) -> Tensor:
        """Make latents (b f c h w) of moments; the noise is drawn for the whole video at once."""
        z = rearrange(moments, "b f c h w -> (b f) c h w")
        if self.kl:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            distribution = DiagonalGaussianDistribution(z)
            draws: Any = generator
            if isinstance(generator, Sequence):  # diffusers takes a list of one generator per frame
                draws = [row for row in generator for _ in range(moments.shape[1])]
            z = distribution.sample(draws) if self.sample else distribution.mode()
        if (self.scale, self.shift) != (1.0, 0.0):
            z = (z - by_channel(self.shift, z)) * by_channel(self.scale, z)
        return rearrange(z, "(b f) c h w -> b f c h w", b=len(moments))

    def undo_scale(self, latents: Tensor) -> Tensor:
        """Return what a decoder reads, z, of latents (b f c h w)."""
        return latents / by_channel(self.scale, latents) + by_channel(self.shift, latents)


def by_channel(values: float | Sequence[float], like: Tensor) -> float | Tensor:
    """Return one value, or one for each channel, such that it broadcasts against `like` (... c h w)."""
    return rearrange(like.new_tensor(values), "c -> c 1 1") if isinstance(values, Sequence) else values
