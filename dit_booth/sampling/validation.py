"""Identity of the subject while training: a few videos of dev prompts, sampled in few steps."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from dit_booth.components import Components
from dit_booth.data.example import Example, VideoDataset
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.evaluation.palette import video_palette_distance
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks
from dit_booth.training.validation import shares

FEW_STEPS = 10
_SEED = 9_173_000_021  # of the noise: the same in every validation, so that a curve shows the network alone


def identity_curve(components: Components, dataset: VideoDataset, ranks: Ranks) -> dict[str, float]:
    """Return means over the data set's first ``train.validate_prompts`` prompts, the same on every rank.

    `palette` (dE2000, of the toy world only) and `own_i`: the mean over frames of the cosine of frame and image
    prompt, whole pictures, by the run's own image encoder, which may also be what conditions the network. Empty where
    no strategy is active. The sampler and the guidance are the run's, the steps at most `FEW_STEPS`, so the values are
    not those of the finished run's samples. Prompts are sampled one by one: a video depends on its own seed alone,
    whatever the number of ranks.
    """
    count = min(components.config.train.validate_prompts, len(dataset))
    if not (count and components.model.active):
        return {}
    sums: dict[str, float] = {}
    for (index,), counted in shares(count, ranks, 1):
        example = dataset[index]
        video = sample_example(components, example, index, ranks.device)
        for name, value in identity_scores(components, example, video).items():
            sums[name] = sums.get(name, 0.0) + (value if counted else 0.0)
    return {
        name: mean * ranks.world / count for name, mean in zip(sums, ranks.mean(*sums.values()), strict=True)
    }


def sample_example(components: Components, example: Example, index: int, device: torch.device) -> Tensor:
    """Sample a video (f 3 h w) of an example's prompts, with noise that depends on its index alone."""
    config = components.config
    partitioned = any(hasattr(p, "ds_id") for p in components.model.parameters())
    torch.manual_seed(_SEED + index)  # an autoencoder's posterior draws from the global generator
    videos = generate(
        components,
        rearrange(example.images, "r c h w -> 1 r c h w").to(device),
        [example.caption],
        [example.subject],
        [_SEED + index],
        size=(config.data.frames, *example.video.shape[-2:]),
        guidance=config.guidance,
        sampler=in_few_steps(config.sampler),
        reuse=not partitioned,  # ZeRO-3 gathers parameters within the whole network's forward pass
    )
    return videos[0]


def in_few_steps(sampler: SamplerConfig) -> SamplerConfig:
    """Return a sampler of at most `FEW_STEPS` steps, evenly spaced where they are fewer than before."""
    if sampler.steps <= FEW_STEPS:
        return sampler
    return replace(sampler, steps=FEW_STEPS, spacing="even")


def identity_scores(components: Components, example: Example, video: Tensor) -> dict[str, float]:
    """Compare a video (f 3 h w) with the image prompt of its example; NaN if the network has diverged."""
    names = (*(["palette"] if example.identity else []), "own_i")
    if not torch.isfinite(video).all():
        return dict.fromkeys(names, math.nan)
    image = rearrange(example.image, "c h w -> 1 c h w").to(video.device)
    frames, prompt = (
        F.normalize(components.image_encoder(pictures).embedding.double(), dim=-1)
        for pictures in (video, image)
    )
    cosine = float(einsum(frames, prompt, "f d, n d -> f n").mean())
    scores = {"own_i": cosine}
    if example.identity:
        scores["palette"] = video_palette_distance(video.float().cpu(), example.image).distance
    return {name: scores[name] for name in names}
