"""Conditioning on frames for prediction and interpolation (LVDM, arXiv 2211.13221, section 3.3): masks and training.

Some frames of a clip are given: in the network's input they stand at a small noise level of their own, a mask channel
says which they are, and the level is told as a class. A training step reads

    mask, level = draw_condition(config, len(x0), x0.shape[1], generator)
    x, target = training_pair(objective, x0, t, objective.from_timestep(level), mask, eps, randn_like(x0, generator))
    loss = per_sample_l1(model(x, objective.timestep(t), level), target).mean()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.diffusion.noise import compute_dtype, require_cpu
from dit_booth.diffusion.objectives import Objective
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class FrameConditioningConfig:
    """Share of each task in training, and the frames that are given; the defaults are LVDM's prediction model."""

    interpolation: float = 0.0
    """Probability that the outer frames, or every `stride`-th one, are given. LVDM's interpolation model: 0.9."""
    prediction: float = 0.5
    """Probability that leading frames are given; in the remaining clips no frame is."""
    previous: tuple[int, ...] = (1,)
    """prediction: numbers of leading frames, of which one is drawn for each clip."""
    stride: int = 0
    """interpolation: distance of the given frames; 0: the first and the last."""
    max_level: int = 250
    """The given frames' timestep is drawn from 0 .. max_level - 1, of 1000."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        check_ranges(
            self,
            "frame_conditioning",
            interpolation="[0, 1]",
            prediction="[0, 1]",
            stride="[0, 100000]",
            max_level="[1, 1000]",
        )
        if self.interpolation + self.prediction > 1:
            raise ValueError(
                f"frame_conditioning: interpolation={self.interpolation} and prediction={self.prediction} "
                "are probabilities of one draw; their sum must be at most 1"
            )
        if not self.previous or min(self.previous) < 1:
            raise ValueError(f"frame_conditioning.previous is {self.previous}: give numbers of at least 1")


# ---- which frames are given --------------------------------------------------------------------------------


def draw_condition(
    config: FrameConditioningConfig, batch: int, frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw the given frames (b f 1 1 1), 1 where given, and their timesteps (b,) int64, of clips without any, too."""
    require_cpu(generator)
    uniform = torch.rand(batch, generator=generator)
    counts = torch.tensor(config.previous)
    previous = counts[torch.randint(len(counts), (batch,), generator=generator)]
    level = torch.randint(config.max_level, (batch,), generator=generator)
    return conditioning_mask(config, uniform, previous, frames), level


def conditioning_mask(
    config: FrameConditioningConfig, uniform: Tensor, previous: Tensor, frames: int
) -> Tensor:
    """Return the mask of each clip (b f 1 1 1): interpolation below the first share, prediction below the sum.

    uniform: (b,) in [0, 1); previous: (b,), leading frames given to a prediction. Raises ValueError if those are all.
    """
    if int(previous.max()) >= frames:
        raise ValueError(
            f"frame_conditioning.previous has {int(previous.max())}, of clips with {frames} frames: "
            "give fewer, or longer clips"
        )
    at = torch.arange(frames)
    every = config.stride or max(frames - 1, 1)
    between, first = at % every == 0, at < rearrange(previous, "b -> b 1")  # f; b f
    interpolates = rearrange(uniform < config.interpolation, "b -> b 1")
    predicts = rearrange(uniform < config.interpolation + config.prediction, "b -> b 1") & ~interpolates
    return rearrange((interpolates & between) | (predicts & first), "b f -> b f 1 1 1").float()


# ---- what the network gets, and what it has to say ---------------------------------------------------------


def network_input(x: Tensor, mask: Tensor) -> Tensor:
    """Append the mask (b f 1 1 1) to latents (b f c h w) as a channel: (b f (c + 1) h w)."""
    height, width = x.shape[-2:]
    channel = repeat(mask.to(x.dtype), "b f 1 1 1 -> b f 1 h w", h=height, w=width)
    return torch.cat([x, channel], dim=2)


def put_frames(x: Tensor, given: Tensor, mask: Tensor) -> Tensor:
    """Return x (b f c h w) with the masked (b f 1 1 1) frames of `given` in the place of its own."""
    return torch.where(mask.bool(), given.to(x.dtype), x)


def training_pair(
    objective: Objective,
    x0: Tensor,
    t: Tensor,
    level: Tensor,
    mask: Tensor,
    eps: Tensor,
    eps_given: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the network's input (b f (c + 1) h w) and the target (b f c h w) of a clip x0 (b f c h w).

    Frames are noised to t (b,) with eps, given ones to `level` (b,) with `eps_given`, both in the objective's units.
    The target covers the given frames, too, as in the released code. eps_given=eps: the same noise for both.
    """
    x = put_frames(objective.noise(x0, t, eps), objective.noise(x0, level, eps_given), mask)
    target = put_frames(objective.target(x0, eps, t), objective.target(x0, eps_given, level), mask)
    return network_input(x, mask), target


def per_sample_l1(pred: Tensor, target: Tensor) -> Tensor:
    """(b,) mean absolute error, LVDM's loss. Raises ValueError for unequal shapes."""
    if pred.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(pred.shape)}, its target {tuple(target.shape)}: they must be equal"
        )
    dtype = compute_dtype(pred, target)
    return (pred.to(dtype) - target.to(dtype)).abs().flatten(1).mean(1)
