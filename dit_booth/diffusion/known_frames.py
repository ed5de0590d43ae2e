"""Known frames of a clip: noised to a level of their own, and marked by a mask (LVDM, arXiv 2211.13221, section 3.3).

A training step reads

    mask, level = draw_known(config, len(x0), x0.shape[1], generator)
    times = frame_times(t, objective.from_timestep(level), mask)
    eps = put_frames(eps, randn_like(x0, generator), mask)
    prediction = model(objective.noise(x0, times, eps), objective.timestep(times), mask)
    loss = objective.loss(prediction, x0, eps, times).mean()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.diffusion.noise import Generators, compute_dtype, per_row
from dit_booth.diffusion.objectives import Objective
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class KnownFramesConfig:
    """Share of each task in training, and the frames that are known; the defaults are LVDM's prediction model."""

    interpolation: float = 0.0
    """Probability that the outer frames, or every `stride`-th one, are known. LVDM's interpolation model: 0.9."""
    prediction: float = 0.5
    """Probability that leading frames are known; in the remaining clips no frame is."""
    previous: tuple[int, ...] = (1,)
    """prediction: numbers of leading frames, of which one is drawn for each clip."""
    stride: int = 0
    """interpolation: distance of the known frames; 0: the first and the last."""
    max_level: int = 250
    """The known frames' timestep is drawn from 0 .. max_level - 1, of 1000."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        check_ranges(
            self,
            "known",
            interpolation="[0, 1]",
            prediction="[0, 1]",
            previous="[1, 100000]",
            stride="[0, 100000]",
            max_level="[1, 1000]",
        )
        if self.interpolation + self.prediction > 1:
            raise ValueError(
                f"known: interpolation={self.interpolation} and prediction={self.prediction} "
                "are probabilities of one draw; their sum must be at most 1"
            )
        if not self.previous:
            raise ValueError("known.previous is (): give a number of at least 1")


# ---- the frames that are known -----------------------------------------------------------------------------


def draw_known(
    config: KnownFramesConfig, batch: int, frames: int, generator: Generators
) -> tuple[Tensor, Tensor]:
    """Draw the known frames (b f 1 1 1), 1 where known, and their timesteps (b,) int64, of clips without any, too."""
    uniform = per_row(lambda n, g: torch.rand(n, generator=g), batch, generator)
    counts = torch.tensor(config.previous)
    index = per_row(lambda n, g: torch.randint(len(counts), (n,), generator=g), batch, generator)
    level = per_row(lambda n, g: torch.randint(config.max_level, (n,), generator=g), batch, generator)
    return known_mask(config, uniform, counts[index], frames), level


def known_mask(config: KnownFramesConfig, uniform: Tensor, previous: Tensor, frames: int) -> Tensor:
    """Return the mask of each clip (b f 1 1 1): interpolation below the first share, prediction below the sum.

    uniform: (b,) in [0, 1); previous: (b,), leading frames known to a prediction. Raises ValueError if those are all.
    """
    if int(previous.max()) >= frames:
        raise ValueError(
            f"known.previous has {int(previous.max())}, of clips with {frames} frames: give fewer, or longer clips"
        )
    at = torch.arange(frames)
    every = config.stride or max(frames - 1, 1)
    between, first = at % every == 0, at < rearrange(previous, "b -> b 1")  # f; b f
    interpolates = rearrange(uniform < config.interpolation, "b -> b 1")
    predicts = rearrange(uniform < config.interpolation + config.prediction, "b -> b 1") & ~interpolates
    return rearrange((interpolates & between) | (predicts & first), "b f -> b f 1 1 1").float()


# ---- the network's input and target ------------------------------------------------------------------------


def frame_times(t: Tensor, level: Tensor, mask: Tensor) -> Tensor:
    """Return the time of every frame (b f): `level` (b,) where the mask (b f 1 1 1) is 1, else t, (b,) or (b f)."""
    others = t if t.ndim == 2 else rearrange(t, "b -> b 1")
    return torch.where(rearrange(mask, "b f 1 1 1 -> b f").bool(), rearrange(level, "b -> b 1"), others)


def put_frames(x: Tensor, known: Tensor, mask: Tensor) -> Tensor:
    """Return x (b f c h w) with the masked (b f 1 1 1) frames of `known` in the place of its own."""
    return torch.where(mask.bool(), known.to(x.dtype), x)


def network_input(x: Tensor, mask: Tensor) -> Tensor:
    """Append the mask (b f 1 1 1) to latents (b f c h w) as a channel: (b f (c + 1) h w)."""
    height, width = x.shape[-2:]
    channel = repeat(mask.to(x.dtype), "b f 1 1 1 -> b f 1 h w", h=height, w=width)
    return torch.cat([x, channel], dim=2)


def training_pair(
    objective: Objective,
    x0: Tensor,
    t: Tensor,
    level: Tensor,
    mask: Tensor,
    eps: Tensor,
    eps_known: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the network's input (b f (c + 1) h w) and the target (b f c h w) of a clip x0 (b f c h w).

    Frames are noised to t (b,) with eps, known ones to `level` (b,) with `eps_known`, both in the objective's units.
    The target covers the known frames, too, as in the released code. eps_known=eps: the same noise for both.
    """
    times, eps = frame_times(t, level, mask), put_frames(eps, eps_known, mask)
    return network_input(objective.noise(x0, times, eps), mask), objective.target(x0, eps, times)


def per_sample_l1(pred: Tensor, target: Tensor) -> Tensor:
    """(b,) mean absolute error, LVDM's loss. Raises ValueError for unequal shapes."""
    if pred.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(pred.shape)}, its target {tuple(target.shape)}: they must be equal"
        )
    dtype = compute_dtype(pred, target)
    return (pred.to(dtype) - target.to(dtype)).abs().flatten(1).mean(1)
