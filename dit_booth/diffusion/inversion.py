"""From a video to the noise that samples it: DDIM inversion (Song et al., 2021, section 4.3), and its flow analogue.

As Tune-A-Video inverts (arXiv 2212.11565, section 4.2): the deterministic sampler runs backwards, without guidance, and
the network is told the noisier timestep of every step while it sees the latents of the cleaner one. Sampling from the
result returns the video up to an error that falls with the number of steps, or with `refine`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from dit_booth.diffusion.noise import Generators, compute_dtype, randn_like
from dit_booth.diffusion.objectives import DiscreteObjective, FlowObjective, Objective
from dit_booth.diffusion.samplers import Model, SamplerConfig, resolve_kind, section_counts
from dit_booth.diffusion.schedule import DiscreteSchedule

PredictEps = Callable[[Tensor, Tensor], Tensor]
"""predict(x (b ...), t (b,) int64, a step of the training process) -> eps (b ...)."""
Step = Callable[[Tensor, Tensor], Tensor]
"""step(x at the cleaner level, latents that the network sees) -> x at the noisier level."""
SMALLEST_T = 0.05
"""Least t at which a flow that predicts x0 is asked for the velocity of clean data (docs/fidelity.md, Inversion)."""


# ---- along the levels of a discrete process ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DDIMPath:
    """The steps of a deterministic DDIM run: step i lies between `levels` i and i + 1, at timestep i of the network."""

    timesteps: Tensor
    """(n,) int64, ascending: steps of the training process."""
    levels: Tensor
    """(n + 1,) abar, descending: of the data (1; diffusers without set_alpha_to_one: abar_0), then of each timestep."""

    @classmethod
    def of(cls, schedule: DiscreteSchedule) -> DDIMPath:
        """Return the path of a (respaced) process, from noise-free data."""
        return cls(schedule.timestep_map, torch.cat([torch.ones(1).double(), schedule.alphas_cumprod]))

    def __len__(self) -> int:
        return len(self.timesteps)

    def t(self, i: int, x: Tensor) -> Tensor:
        """Return the timestep of step i for each row of x: (b,)."""
        return torch.full((len(x),), int(self.timesteps[i]), device=x.device)

    def add_noise(self, i: int, x: Tensor, eps: Tensor) -> Tensor:
        """Move x (b ...) from level i to level i + 1 along eps."""
        return ddim_move(x, eps, self.levels[i].item(), self.levels[i + 1].item())

    def denoise(
        self, i: int, x: Tensor, eps: Tensor, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """Move x (b ...) from level i + 1 to level i along eps; with `eta`, part of it is fresh `noise`."""
        level, after = self.levels[i + 1].item(), self.levels[i].item()
        if noise is None:
            return ddim_move(x, eps, level, after)
        return ddim_move(x, eps, level, after, self.sigma(i, eta)) + self.sigma(i, eta) * noise

    def sigma(self, i: int, eta: float) -> float:
        """Return the standard deviation of the fresh noise of step i (DDIM eq. 16)."""
        level, after = self.levels[i + 1].item(), self.levels[i].item()
        return eta * sqrt((1 - after) / (1 - level) * (1 - level / after))


def ddim_move(x: Tensor, eps: Tensor, level: float, after: float, sigma: float = 0.0) -> Tensor:
    """sqrt(after) x0 + sqrt(1 - after - sigma^2) eps with x0 = (x - sqrt(1 - level) eps) / sqrt(level): DDIM eq. 12.

    level, after: abar of x and of the result, in either direction. x0 is eliminated: at late steps it is large.
    """
    ratio = sqrt(after / level)
    return ratio * x + (sqrt(max(1 - after - sigma**2, 0)) - ratio * sqrt(1 - level)) * eps


def invert_along(path: DDIMPath, predict: PredictEps, x0: Tensor) -> list[Tensor]:
    """Return the latents (b ...) at every level of the path, the data first."""
    states = [x0]
    for i in range(len(path)):
        x = states[-1]
        states.append(path.add_noise(i, x, predict(x, path.t(i, x))))
    return states


def sample_along(
    path: DDIMPath,
    predict: PredictEps,
    noise: Tensor,
    eta: float = 0.0,
    generator: Generators | None = None,
) -> list[Tensor]:
    """Return the latents (b ...) at every level of the path on the way back, the noise first.

    generator: of the fresh noise of every step, the last one included; needed for `eta` above 0.
    """
    states = [noise]
    for i in reversed(range(len(path))):
        x = states[-1]
        eps = predict(x, path.t(i, x))
        fresh = None if generator is None else randn_like(x, generator)
        states.append(path.denoise(i, x, eps, eta, fresh))
    return states


# ---- the inverse of `sample` -------------------------------------------------------------------------------


@torch.no_grad()
def invert(model: Model, objective: Objective, config: SamplerConfig, x0: Tensor, refine: int = 0) -> Tensor:
    """Return the noise (b ...) from which `sample` with the same arguments returns about x0 (b ...).

    For eps and v along DDIM, for flow along Euler's steps, which stand for the others'. Of a flow that predicts x0, the
    steps below `SMALLEST_T` are one. `clip_x0` is not applied. The state is kept in float32 at least.
    refine: times that each step is solved again, with the network at its own result (a fixed-point iteration that
    converges to the sampler's exact inverse), for 1 + refine predictions per step.
    Raises ValueError for a sampler that draws noise, or one that does not fit the objective.
    """
    kind = resolve_kind(config, objective)
    if kind == "ddpm" or config.eta > 0:
        raise ValueError(
            f"sampler.kind={kind} with eta={config.eta} draws noise in every step and has no inverse; "
            "use kind=ddim or euler with eta=0"
        )
    if refine < 0:
        raise ValueError(f"refine={refine}: the number of repetitions of a step is at least 0")

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return model(x.to(x0.dtype), objective.timestep(t)).to(x.dtype)

    x = x0.to(compute_dtype(x0))
    for step in _inverse_steps(predict, objective, config):
        seen = x
        for _ in range(1 + refine):
            seen = step(x, seen)
        x = seen
    return x.to(x0.dtype)


def _inverse_steps(predict: PredictEps, objective: Objective, config: SamplerConfig) -> Iterator[Step]:
    """Yield the sampler's steps backwards, from the data."""
    if isinstance(objective, FlowObjective):
        for s, t in pairwise(_ascending(objective, config)):
            yield _euler_step(predict, objective, s, t)
    else:
        assert isinstance(objective, DiscreteObjective)
        path = DDIMPath.of(objective.schedule.respace(section_counts(config)))
        for i in range(len(path)):
            yield _ddim_step(predict, objective, path, i)


def _ddim_step(predict: PredictEps, objective: Objective, path: DDIMPath, i: int) -> Step:
    def step(x: Tensor, seen: Tensor) -> Tensor:
        t = path.t(i, x)
        return path.add_noise(i, x, objective.to_eps(predict(seen, t), seen, t))

    return step


def _euler_step(predict: PredictEps, objective: FlowObjective, s: float, t: float) -> Step:
    """x_t = x_s + (t - s) v with v = (x - x0) / t, as the sampler's step from t to s has it."""

    def step(x: Tensor, seen: Tensor) -> Tensor:
        at = torch.full((len(x),), t, device=x.device, dtype=x.dtype)
        x0 = objective.to_x0(predict(seen, at), seen, at)
        return x + (t - s) * (seen - x0) / t

    return step


def _ascending(objective: FlowObjective, config: SamplerConfig) -> list[float]:
    """Return the sampler's t from 0 to 1; of an x0 prediction, those below `SMALLEST_T` are one step.

    There v = (x - x0) / t is mostly the network's error in x0 over t: more steps would add up noise that is none.
    """
    grid: list[float] = objective.sampling_grid(config.steps, config.spacing).flip(0).tolist()
    if objective.config.prediction == "velocity":
        return grid
    return [grid[0], *(t for t in grid[1:] if t >= SMALLEST_T - 1e-9)]
