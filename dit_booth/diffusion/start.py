"""Latents that sampling starts from: noise, the moved latents of frame 0, or an inverted video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from dit_booth.diffusion.motion_warp import motion_field, renoise, smooth_background, warp
from dit_booth.diffusion.noise import Generators, randn
from dit_booth.diffusion.objectives import Objective
from dit_booth.diffusion.samplers import Model, SamplerConfig, sample, time_before
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class StartConfig:
    """What a video's latents start from."""

    kind: Literal["noise", "warp", "inversion"] = "noise"
    """noise; warp: the latents of frame 0, sampled in part, moved, and noised again (Text2Video-Zero); inversion: the
    noise that samples subject.video (Tune-A-Video)."""
    denoised: float = 0.12
    """warp: share of the steps that frame 0 takes before it is moved (Text2Video-Zero: t0 = 44 of 50)."""
    renoised: float = 0.06
    """warp: share of the steps after which the moved frames go on (Text2Video-Zero: t1 = 47 of 50)."""
    motion: tuple[float, float] = (12.0, 12.0)
    """warp: motion per frame to the left and up, in pixels of an image of 512 (Text2Video-Zero: 12, 12)."""
    background: float = 0.0
    """warp: weight of frame 0's moved background in that of the other frames, which are then sampled twice; 0: none
    (Text2Video-Zero's background smoothing: 0.6)."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "start", denoised="[0, 1)", renoised="[0, 1)", motion="[-512, 512]", background="[0, 1]"
        )
        if self.renoised > self.denoised:
            raise ValueError(
                f"start.renoised is {self.renoised}, more than start.denoised {self.denoised}; moved frames get noise"
                " added: make it smaller"
            )


@dataclass
class WarpedStart:
    """Text2Video-Zero's latents (arXiv 2303.13439, section 3.3) of any frames of a video, made from those of frame 0.

    Frame 0 is sampled alone for `config.denoised` of the steps. Its latents are moved along the motion field of every
    frame, told by its index in the video, and noised again to the level of `config.renoised`.
    """

    objective: Objective
    sampler: SamplerConfig
    config: StartConfig
    first: Tensor | None = None
    """Frame 0 (b 1 c h w), sampled in part: made by the first frames that are asked for."""

    def latents(
        self, predict: Model, noise: Tensor, frames: Sequence[int], draws: Generators
    ) -> tuple[Tensor, int]:
        """Return the latents of frames of the video (b f c h w), and the step to go on from.

        noise: b f c h w, whose first frame is that of frame 0 if it has not been sampled yet.
        """
        objective, sampler, config = self.objective, self.sampler, self.config
        late, early = (round(share * sampler.steps) for share in (config.denoised, config.renoised))
        if self.first is None:
            self.first = sample(predict, objective, sampler, noise[:, :1], draws, steps=range(late))
        still = repeat(self.first, "b 1 c h w -> b f c h w", f=len(frames))
        moved = warp(still, motion_field(frames, config.motion))
        t0, t1 = (
            repeat(time_before(objective, sampler, step), "-> b", b=len(noise)).to(noise.device)
            for step in (late, early)
        )
        eps = randn(noise.shape, draws, noise.device, noise.dtype)
        return renoise(objective, moved, t0, t1, eps), early

    def smooth(self, latents: Tensor, foreground: Tensor) -> Tensor:
        """Mix the moved background of frame 0 into that of all frames of a video, from frame 0 on (b f c h w).

        latents: of `latents`; foreground: b f 1 h w in [0, 1]. What frame 0's own foreground moves to is left as it is.
        """
        frames = latents.shape[1]
        field = motion_field(range(frames), self.config.motion)
        moved, shown = (
            warp(repeat(whole[:, 0], "b c h w -> b f c h w", f=frames), field)
            for whole in (latents, foreground)
        )
        return smooth_background(latents, moved, torch.maximum(foreground, shown), self.config.background)
