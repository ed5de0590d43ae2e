"""A queue of frames at rising noise levels (FIFO-Diffusion, arXiv 2405.11473; Diffusion Forcing, arXiv 2407.01392).

Every step of the queue takes each frame one sampling step further; then the first one is finished and leaves, and noise
is appended. The queue has as many frames as the sampler has steps. At the video's beginning all frames are noise, and
frame i takes its first step in step i.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_booth.diffusion.noise import Generators, expand_like, randn_like
from dit_booth.diffusion.objectives import DiscreteObjective, FlowObjective, Objective
from dit_booth.diffusion.samplers import (
    SamplerConfig,
    ddim_step,
    ddpm_step,
    euler_step,
    resolve_kind,
    section_counts,
)
from dit_booth.diffusion.schedule import DiscreteSchedule


@dataclass(frozen=True)
class FrameSteps:
    """The steps of a sampler, of which each frame takes one of its own.

    ValueError: the sampler does not fit the objective, or its step is no function of one prediction (heun, unipc).
    """

    objective: Objective
    config: SamplerConfig

    def __post_init__(self) -> None:
        kind = resolve_kind(self.config, self.objective)
        if kind in ("heun", "unipc"):
            why = {"heun": "evaluates the network twice in a step", "unipc": "uses all frames' earlier steps"}
            raise ValueError(
                f"sampler.kind is {kind}, which {why[kind]}; with sample.long.kind diffusion_forcing use euler"
            )

    @cached_property
    def _grid(self) -> Tensor:
        assert isinstance(self.objective, FlowObjective)
        return self.objective.sampling_grid(self.config.steps, self.config.spacing)

    @cached_property
    def _spaced(self) -> DiscreteSchedule:
        assert isinstance(self.objective, DiscreteObjective)
        return self.objective.schedule.respace(section_counts(self.config))

    def t(self, step: Tensor) -> Tensor:
        """Return t, in the objective's units, at which steps (b f) begin; 0 is the sampler's first."""
        if isinstance(self.objective, FlowObjective):
            return self._grid.to(step.device)[step].float()
        return self._spaced.timestep_map.to(step.device)[len(self._spaced) - 1 - step]

    def x0(self, prediction: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Return the estimate of the data (b f c h w) that a prediction at x implies, clamped as the sampler says."""
        x0 = self.objective.to_x0(prediction.to(x.dtype), x, self.t(step))
        bound = self.config.clip_x0
        return x0 if bound is None else x0.clamp(-bound, bound)

    def advance(self, x0: Tensor, x: Tensor, step: Tensor, generator: Generators) -> Tensor:
        """Return x (b f c h w) after one step of each frame (b f)."""
        kind, eta = resolve_kind(self.config, self.objective), self.config.eta
        fresh = randn_like(x, generator) if kind == "ddpm" or eta > 0 else None
        if kind == "euler":
            t, s = (expand_like(self._grid.to(x)[k], x) for k in (step, step + 1))
            return euler_step(x0, x, t, s, eta, fresh)
        index = len(self._spaced) - 1 - step
        if kind == "ddpm":
            return ddpm_step(self._spaced, x0, x, index, fresh)
        return ddim_step(self._spaced, x0, x, index, eta, fresh)


def steps_of(first: int, frames: int, step: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the sampling step (f,) of the frames from `first` on in a step of the queue, and which take it (f,).

    Frame i is to take step ``step - i``; before, it is noise, and waits at the first one.
    """
    own = step - torch.arange(first, first + frames)
    return own.clamp(0, steps - 1), own >= 0
