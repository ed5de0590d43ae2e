"""From image prompts and captions to videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from einops import repeat
from torch import Tensor

from dit_booth.diffusion.guidance import guide
from dit_booth.diffusion.noise import randn
from dit_booth.diffusion.samplers import sample
from dit_booth.models.clip import NULL_PROMPT
from dit_booth.training.build import Parts


@torch.no_grad()
def generate(
    parts: Parts,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    seeds: Sequence[int],
    *,
    size: tuple[int, int, int],
    use_image: bool = True,
) -> Tensor:
    """Sample one video per row: (b f 3 h w) in [-1, 1].

    images: (b 3 s s) in [-1, 1]; `size` is (frames, height, width) in pixels. A row's noise depends on its seed
    alone, so a video is the same in every batch. The unconditional branch of guidance has the null prompt and the
    zero image, as rows that training drops have.
    """
    device = images.device
    parts.root.eval()
    dtype = next(parts.root.parameters()).dtype
    frames, height, width = size
    factor, channels = parts.autoencoder.factor, parts.autoencoder.channels
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    batch, guided = len(images), parts.config.guidance.scale != 1
    prompt = parts.root.text.tokenize(
        [*captions, *([NULL_PROMPT] * batch if guided else [])],
        [*subjects, *([None] * batch if guided else [])],
    )
    pictures = torch.cat([images, torch.zeros_like(images)]) if guided else images
    reference = parts.reference(pictures, dtype) if use_image and parts.root.active else None

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        rows = 2 if guided else 1
        both, times = repeat(x, "b ... -> (r b) ...", r=rows), repeat(timestep, "b -> (r b)", r=rows)
        noised = reference
        if reference is not None:
            eps = randn((batch, *reference.latent.shape[1:]), draws, device, dtype)
            eps = repeat(eps, "b ... -> (r b) ...", r=rows)
            noised = replace(
                reference, noisy=parts.objective.noise(reference.latent, parts.objective.time(times), eps)
            )
        output = parts.root(both, times, prompt, noised).output
        if not guided:
            return output
        conditional, unconditional = output.chunk(2)
        return guide(conditional, unconditional, parts.config.guidance.scale, parts.config.guidance.channels)

    start = randn((batch, frames, channels, height // factor, width // factor), draws, device, dtype)
    latents = sample(model, parts.objective, parts.config.sampler, start, draws)
    return parts.autoencoder.decode(latents).clamp(-1, 1)
