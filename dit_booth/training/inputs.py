"""From a batch of videos to the inputs of one training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import StageConfig
from dit_booth.data.example import Batch
from dit_booth.diffusion.known_frames import draw_known, frame_times, put_frames
from dit_booth.diffusion.noise import Generators, per_row, randn, randn_like
from dit_booth.diffusion.objectives import Objective, foreground_weight
from dit_booth.inject import Reference, timestep_of_reference
from dit_booth.models.clip.encoders import Prompt
from dit_booth.models.injected import Prediction
from dit_booth.training.encoded import EncodedBatch

_LENGTH = 1
"""Tells the draw of a step's length from those of its rows."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of the network (x_t, timestep, prompt, reference, known) and of its loss (x0, eps, t, region)."""

    x_t: Tensor  # b f c h w
    timestep: Tensor  # b, or b f
    prompt: Prompt
    reference: Reference | None
    x0: Tensor  # b f c h w
    eps: Tensor  # b f c h w
    t: Tensor  # b, or b f
    known: Tensor | None = None  # b f 1 1 1, 1 in frames that are known to the network
    region: Tensor | None = None  # b f 1 h w, weights of the positions in the loss

    def predict(self, network: Callable[..., Prediction]) -> Prediction:
        """Call the network, or the engine around it."""
        return network(self.x_t, self.timestep, self.prompt, self.reference, known=self.known)

    def loss(self, objective: Objective, prediction: Prediction) -> Tensor:
        """Compute the objective's loss, a scalar: the mean over the videos and a prediction beside them.

        The latter has no noise (CatVTON's reference half): its truth is the latent itself with eps = 0.
        """
        loss = objective.loss(prediction.output, self.x0, self.eps, self.t, self.region).mean()
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


def with_length(stage: StageConfig, *seeds: int) -> StageConfig:
    """Return a stage's settings with one of its lengths, drawn for the seeds (seed, stage, step).

    All videos of a step have this length, on every rank, and again after a resumption.
    """
    if len(stage.lengths) == 1:
        return stage
    draw = generator_of(*seeds, _LENGTH)
    return replace(stage, frames=stage.lengths[int(torch.randint(len(stage.lengths), (), generator=draw))])


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
    the batch around it, hence not on the number of ranks.

    With ``objective.per_frame`` every frame has a t of its own. Where an active strategy tells the network which frames
    are known, some are (section `known`): at a level of their own, with noise of their own, and they count in the loss
    (LVDM's released code). A given `t` (b,) is taken for all frames instead of what is drawn, and no frame is known.
    ValueError: an image prompt that is all white, or a subject without a mask that the stage needs.
    """
    config, model, objective = components.config, components.model, components.objective
    _check_frames(components, batch, stage)
    video, mask = _crop(batch, stage, generator)
    u = per_row(lambda n, g: torch.rand(n, generator=g), len(batch), generator)
    no_image = u < stage.drop + stage.drop_image
    no_text = (u < stage.drop) | (~no_image & (u < stage.drop + stage.drop_image + stage.drop_text))
    captions = [model.text.null_prompt if d else c for c, d in zip(batch.captions, no_text, strict=True)]
    subjects = [None if d else s or None for s, d in zip(batch.subjects, no_text, strict=True)]
    prompt = components.tokenize(captions, subjects)
    if isinstance(batch, EncodedBatch):  # its video holds moments
        batch.tell_text(model.text)
        x0 = batch.posterior.draw(video, generator).float()
    else:
        x0 = components.autoencoder.encode(video, generator)
    shape, reference, frames = x0.shape, None, x0.shape[1]
    fixed, t = t, _draw_t(components, len(batch), frames, generator) if t is None else t
    t, known = t.to(x0.device), None
    if fixed is None and not stage.single_frames and model.strategy.reads_known_frames(model.active):
        known, level = (y.to(x0.device) for y in draw_known(config.known, len(batch), frames, generator))
        t = frame_times(t, objective.from_timestep(level), known)
    if with_image:
        reference = make_reference(components, batch, no_image, dtype, generator)
        reference = components.with_first_frame(reference, frames, *x0.shape[-2:])
        clean = components.copies(reference)
        noisy = objective.noise(clean, timestep_of_reference(t), randn_like(clean, generator))
        reference = replace(reference, noisy=noisy)
    if stage.single_frames:
        x0, prompt, t, reference = _single_frames(components, x0, prompt, reference, generator, fixed)
    eps = randn(shape, generator, x0.device, x0.dtype).reshape(x0.shape)  # a row's frames are one draw
    if known is not None:
        eps = put_frames(eps, randn_like(x0, generator), known)
    x_t = objective.noise(x0, t, eps).to(dtype)
    region = _region(batch.keys, mask, x0) if stage.foreground else None
    return Inputs(x_t, objective.timestep(t), prompt, reference, x0, eps, t, known, region)


def _check_frames(components: Components, batch: Batch | EncodedBatch, stage: StageConfig) -> None:
    """Raise ValueError for what needs a latent of every frame where the autoencoder groups frames."""
    if components.config.autoencoder.frames_factor == 1 or batch.video.shape[1] == 1:
        return
    grouped = (
        f"autoencoder.kind is {components.config.autoencoder.kind}, whose latents hold several frames each"
    )
    if stage.single_frames:
        raise ValueError(f"the stage's single_frames is true, but {grouped}; set data.frames to 1")
    if stage.frames and isinstance(batch, EncodedBatch):
        raise ValueError(
            f"the stage's frames is {stage.frames}, but {grouped}: those of a whole video, encoded before, cannot be"
            " cropped; set it to 0, or leave data.cache empty"
        )


def make_reference(
    components: Components,
    batch: Batch | EncodedBatch,
    no_image: Tensor,
    dtype: torch.dtype,
    generator: Generators,
) -> Reference:
    """Return the image prompts as strategies see them; rows in `no_image` (b, bool) have zero images.

    ValueError: an image prompt is all white.
    """
    if isinstance(batch, EncodedBatch):
        components.check_images(batch.images, batch.keys)
        return batch.reference(no_image, dtype, generator)
    components.check_images(batch.images, batch.keys)
    images = batch.images * rearrange(~no_image, "b -> b 1 1 1 1").to(batch.image.device)
    return components.reference(images, dtype, generator)


def _crop(batch: Batch | EncodedBatch, stage: StageConfig, generator: Generators) -> tuple[Tensor, Tensor]:
    """Return videos (b f 3 h w) and masks (b f h w), cropped to the consecutive frames that the stage asks for."""
    count = batch.video.shape[1]
    frames = stage.frames_of(count)
    if not stage.frames:
        return batch.video, batch.mask
    starts = per_row(
        lambda n, g: torch.randint(count - frames + 1, (n,), generator=g), len(batch), generator
    ).tolist()
    video, mask = (
        torch.stack([row[start : start + frames] for row, start in zip(rows, starts, strict=True)])
        for rows in (batch.video, batch.mask)
    )
    return video, mask


def _draw_t(components: Components, rows: int, frames: int, generator: Generators) -> Tensor:
    """Draw the t of each video (b,) or, with ``objective.per_frame``, of each frame (b f)."""
    if components.config.objective.per_frame:
        return _draw_t_by_frame(components, rows, frames, generator)
    return per_row(components.objective.sample_t, rows, generator)


def _draw_t_by_frame(components: Components, rows: int, frames: int, generator: Generators) -> Tensor:
    def draw(n: int, g: torch.Generator) -> Tensor:
        return rearrange(components.objective.sample_t(n * frames, g), "(b f) -> b f", f=frames)

    return per_row(draw, rows, generator)


def _region(keys: Sequence[str], mask: Tensor, x0: Tensor) -> Tensor:
    """Return the weights (b f 1 h w) that make the loss one of the subject, whose mask is b f' h w of pixels.

    A latent of several frames has the mean of their masks. Frames that the data have no mask of (VideoBooth's: all but
    the first) do not count.
    ValueError: an example has no mask in these frames.
    """
    for key, shown in zip(keys, mask.flatten(1).any(1).tolist(), strict=True):
        if not shown:
            raise ValueError(
                f"{key} has no mask of its subject in the frames that are trained on, and the stage's foreground is"
                " true; set it to false, or give the data masks (of frame 0 alone: leave the stage's frames at 0)"
            )
    frames, (height, width) = x0.shape[1], x0.shape[-2:]
    by_size = reduce(mask.to(x0.dtype), "b f (h p) (w q) -> b f 1 h w", "mean", h=height, w=width)
    share = by_size
    if frames < by_size.shape[1]:  # the first frame stands alone
        others = reduce(by_size[:, 1:], "b (f g) 1 h w -> b f 1 h w", "mean", f=frames - 1)
        share = torch.cat([by_size[:, :1], others], dim=1)
    return foreground_weight(share, x0.shape[2]).reshape(*x0.shape[:2], 1, height, width)


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
        t = rearrange(_draw_t_by_frame(components, rows, frames, generator), "b f -> (b f)")
    else:
        t = repeat(fixed, "b -> (b f)", f=frames)
    t = t.to(x0.device)
    x0 = rearrange(x0, "b f c h w -> (b f) 1 c h w")
    return x0, prompt.each(lambda y: repeat(y, "b l -> (b f) l", f=frames)), t, None
