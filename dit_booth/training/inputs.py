"""From a batch of videos to the inputs of one training step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import StageConfig
from dit_booth.data.example import Batch
from dit_booth.diffusion.noise import Generators, per_row, randn, randn_like
from dit_booth.diffusion.objectives import Objective
from dit_booth.inject import Reference
from dit_booth.models.clip.encoders import NULL_PROMPT, Prompt
from dit_booth.models.injected import Prediction
from dit_booth.training.encoded import EncodedBatch


@dataclass(frozen=True)
class Inputs:
    """Arguments of the network (x_t, timestep, prompt, reference) and of its loss (x0, eps, t)."""

    x_t: Tensor  # b f c h w
    timestep: Tensor  # b
    prompt: Prompt
    reference: Reference | None
    x0: Tensor  # b f c h w
    eps: Tensor  # b f c h w
    t: Tensor  # b

    def loss(self, objective: Objective, prediction: Prediction) -> Tensor:
        """Compute the objective's loss, a scalar: the mean over the videos and a prediction beside them.

        The latter has no noise (CatVTON's reference half): its truth is the latent itself with eps = 0.
        """
        loss = objective.loss(prediction.output, self.x0, self.eps, self.t).mean()
        if prediction.aux_prediction is None:
            return loss
        beside, latent = prediction.aux_prediction
        share = beside.numel() / (beside.numel() + prediction.output.numel())
        return torch.lerp(
            loss, objective.loss(beside, latent, torch.zeros_like(latent), self.t).mean(), share
        )


def generator_of(*seeds: int) -> torch.Generator:
    """Return a generator that is a pure function of the seeds (seed, stage, step, ...): resuming repeats it."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed % 2**63)


@torch.no_grad()
def make_inputs(
    components: Components,
    batch: Batch | EncodedBatch,
    stage: StageConfig,
    generator: Generators,
    dtype: torch.dtype,
    with_image: bool,
    t: Tensor | None = None,
) -> Inputs:
    """Encode, drop, draw t and noise. The reference's noise is drawn before the video's, as in VideoBooth.

    Rows that are dropped get the null prompt and the zero image (VideoBooth section 3.3's training), or one of the two
    (InstructPix2Pix, arXiv 2211.09800, section 3.2.1). With a generator for each row, a row's draws do not depend on
    the batch around it, hence not on the number of ranks. A given `t` (b,) is taken instead of one that is drawn.
    """
    frames = stage.frames_of(batch.video.shape[1])
    video = _crop(batch.video, frames, generator) if stage.frames else batch.video
    u = per_row(lambda n, g: torch.rand(n, generator=g), len(batch), generator)
    no_image = u < stage.drop + stage.drop_image
    no_text = (u < stage.drop) | (~no_image & (u < stage.drop + stage.drop_image + stage.drop_text))
    captions = [NULL_PROMPT if d else c for c, d in zip(batch.captions, no_text, strict=True)]
    subjects = [None if d else s or None for s, d in zip(batch.subjects, no_text, strict=True)]
    prompt = components.tokenize(captions, subjects)
    if isinstance(batch, EncodedBatch):  # its video holds moments
        x0 = batch.posterior.draw(video, generator).float()
    else:
        x0 = components.autoencoder.encode(video, generator)
    shape, reference = x0.shape, None
    fixed, t = t, per_row(components.objective.sample_t, len(batch), generator) if t is None else t
    t = t.to(x0.device)
    if with_image:
        reference = make_reference(components, batch, no_image, dtype, generator)
        clean = components.copies(reference)
        noisy = components.objective.noise(clean, t, randn_like(clean, generator))
        reference = replace(reference, noisy=noisy)
    if stage.single_frames:
        x0, prompt, t, reference = _single_frames(components, x0, prompt, reference, generator, fixed)
    eps = randn(shape, generator, x0.device, x0.dtype).reshape(x0.shape)  # a row's frames are one draw
    x_t = components.objective.noise(x0, t, eps).to(dtype)
    return Inputs(x_t, components.objective.timestep(t), prompt, reference, x0, eps, t)


def make_reference(
    components: Components,
    batch: Batch | EncodedBatch,
    no_image: Tensor,
    dtype: torch.dtype,
    generator: Generators,
) -> Reference:
    """Return the image prompts as strategies see them; rows in `no_image` (b, bool) have the zero image."""
    if isinstance(batch, EncodedBatch):
        return batch.reference(no_image, dtype, generator)
    images = batch.image * rearrange(~no_image, "b -> b 1 1 1").to(batch.image.device)
    return components.reference(images, dtype, generator)


def _crop(video: Tensor, frames: int, generator: Generators) -> Tensor:
    """Crop `frames` consecutive frames of each video (b f 3 h w) at a random offset."""
    starts = video.shape[1] - frames + 1
    first = per_row(lambda n, g: torch.randint(starts, (n,), generator=g), len(video), generator)
    return torch.stack([v[start : start + frames] for v, start in zip(video, first.tolist(), strict=True)])


def _single_frames(
    components: Components,
    x0: Tensor,
    prompt: Prompt,
    reference: Reference | None,
    generator: Generators,
    fixed: Tensor | None,
) -> tuple[Tensor, Prompt, Tensor, Reference | None]:
    """Make every frame a video of one frame, with its own t, or with the `fixed` t (b,) of its video."""
    if reference is not None:
        raise ValueError("single_frames is for stages without an image (base); set it to false in this stage")
    rows, frames = x0.shape[:2]
    if fixed is None:
        t = per_row(lambda n, g: components.objective.sample_t(n * frames, g), rows, generator)
    else:
        t = repeat(fixed, "b -> (b f)", f=frames)
    t = t.to(x0.device)
    x0 = rearrange(x0, "b f c h w -> (b f) 1 c h w")
    return x0, prompt.each(lambda y: repeat(y, "b l -> (b f) l", f=frames)), t, None
