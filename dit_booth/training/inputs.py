"""From a batch of videos to what one training step needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.config import StageConfig
from dit_booth.data.example import Batch
from dit_booth.diffusion.noise import randn_like
from dit_booth.inject import Reference
from dit_booth.models.clip import NULL_PROMPT, Prompt
from dit_booth.training.build import Parts


@dataclass(frozen=True)
class Inputs:
    """The arguments of the network (x_t, timestep, prompt, reference), and what its loss needs (x0, eps, t)."""

    x_t: Tensor  # b f c h w
    timestep: Tensor  # b
    prompt: Prompt
    reference: Reference | None
    x0: Tensor  # b f c h w
    eps: Tensor  # b f c h w
    t: Tensor  # b


def generator_of(*numbers: int) -> torch.Generator:
    """A generator that is a pure function of its numbers (seed, stage, step, ...): resuming repeats it."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed % 2**63)


@torch.no_grad()
def make_inputs(
    parts: Parts,
    batch: Batch,
    stage: StageConfig,
    generator: torch.Generator,
    dtype: torch.dtype,
    with_image: bool,
) -> Inputs:
    """Encode, drop, draw times and noise. The reference's noise is drawn before the video's, as in VideoBooth.

    Rows that are dropped get the null prompt and the zero image (VideoBooth section 3.3's training).
    """
    dropped = torch.rand(len(batch), generator=generator) < stage.drop
    captions = [NULL_PROMPT if d else c for c, d in zip(batch.captions, dropped, strict=True)]
    subjects = [None if d else s for s, d in zip(batch.subjects, dropped, strict=True)]
    prompt = parts.root.text.tokenize(captions, subjects)
    x0 = parts.autoencoder.encode(batch.video, generator)
    t = parts.objective.sample_t(len(batch), generator, x0.device)
    reference = None
    if with_image:
        images = batch.image * rearrange(~dropped, "b -> b 1 1 1").to(batch.image.device)
        reference = parts.reference(images, dtype)
        noisy = parts.objective.noise(reference.latent, t, randn_like(reference.latent, generator))
        reference = replace(reference, noisy=noisy)
    if stage.single_frames:
        x0, prompt, t, reference = _single_frames(parts, x0, prompt, reference, generator)
    eps = randn_like(x0, generator)
    x_t = parts.objective.noise(x0, t, eps).to(dtype)
    return Inputs(x_t, parts.objective.timestep(t), prompt, reference, x0, eps, t)


def _single_frames(
    parts: Parts, x0: Tensor, prompt: Prompt, reference: Reference | None, generator: torch.Generator
) -> tuple[Tensor, Prompt, Tensor, Reference | None]:
    """Every frame becomes a video of one frame, with a time of its own."""
    if reference is not None:
        raise ValueError("single_frames is for stages without an image (base); set it to false in this stage")
    frames = x0.shape[1]
    x0 = rearrange(x0, "b f c h w -> (b f) 1 c h w")
    ids, spans = (repeat(y, "b l -> (b f) l", f=frames) for y in (prompt.ids, prompt.spans))
    return x0, Prompt(ids, spans), parts.objective.sample_t(len(x0), generator, x0.device), None
