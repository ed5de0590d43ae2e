"""Training objectives: the network predicts eps, v, or a flow's velocity.

An objective fixes the path from data to noise, the regression target, and how a prediction becomes an
estimate of the data. A training step reads

    t = objective.sample_t(len(x0), generator, x0.device)
    eps = randn_like(x0, generator)
    prediction = model(objective.noise(x0, t, eps), objective.timestep(t))
    loss = objective.loss(prediction, x0, eps, t).mean()

`t` is in the objective's own unit (an integer step, or a fraction in [0, 1]); the timestep in [0, 1000) is
what a network's embedding receives. Arrays are (b ...): any axes may follow the batch. Wherever t is (b,), it may
be (b f), one for each frame of arrays (b f ...) (Diffusion Forcing, arXiv 2407.01392). Arithmetic is in float32 or
more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from dit_booth.diffusion.noise import compute_dtype, expand_like, require_cpu
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.schedule import (
    NUM_TIMESTEPS,
    DiscreteSchedule,
    linear_betas,
    scaled_linear_betas,
)

_BETAS = {"linear": (linear_betas, 1e-4, 0.02), "scaled_linear": (scaled_linear_betas, 8.5e-4, 0.012)}


class Objective(ABC):
    """The path from data to noise, the target, and the conversions of a prediction."""

    @abstractmethod
    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return x_t (b ...) at t (b,), in the dtype of x0."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the regression target of the network at x_t: (b ...)."""

    @abstractmethod
    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The data that a prediction implies."""

    @abstractmethod
    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies."""

    @abstractmethod
    def sample_t(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """Draw t (batch,) for training, on the CPU, and move it."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Timestep in [0, 1000) for the network's timestep embedding: (b,) floating point."""

    @abstractmethod
    def from_timestep(self, timestep: Tensor) -> Tensor:
        """Return t (b,) of a timestep: the inverse of `timestep`."""

    @abstractmethod
    def t_at(self, share: Tensor) -> Tensor:
        """Return t (b,) at a share in [0, 1) of its range; 0 is the data."""

    def loss(self, pred: Tensor, x0: Tensor, eps: Tensor, t: Tensor, region: Tensor | None = None) -> Tensor:
        """(b,) mean squared error over all other axes, weighted by the noise level (`weigh`).

        region: weights of the positions (b ... 1 h w), such as `foreground_weight`.
        """
        error = per_sample_mse(pred, self.target(x0, eps, t), region, axes=t.ndim)
        return reduce(self.weigh(error, t), "b ... -> b", "mean")

    def weigh(self, error: Tensor, t: Tensor) -> Tensor:
        """Return squared errors at t, both (b,) or (b f), as they enter the loss. Default: unweighted."""
        return error


def per_sample_mse(pred: Tensor, target: Tensor, region: Tensor | None = None, axes: int = 1) -> Tensor:
    """(b,) mean over all but the first `axes` axes, in float32 at least; `region`: weights, broadcastable.

    Raises ValueError for unequal shapes.
    """
    if pred.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(pred.shape)}, its target {tuple(target.shape)}: they must be equal "
            "(drop variance channels first)"
        )
    dtype = compute_dtype(pred, target)
    error = (pred.to(dtype) - target.to(dtype)).square()
    return (error if region is None else error * region).flatten(axes).mean(-1)


def foreground_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """(b,) squared error, summed over channels and averaged over the positions of a mask (ELITE's local stage).

    pred, target: (b ... c h w); mask: (b ... 1 h w) in [0, 1]. An empty mask gives 0. ELITE divides by the mask of one
    channel, too: this is c times the mean over the region. Raises ValueError for other shapes.
    """
    if pred.shape != target.shape or mask.shape != (*pred.shape[:-3], 1, *pred.shape[-2:]):
        raise ValueError(
            f"prediction {tuple(pred.shape)}, target {tuple(target.shape)} and mask {tuple(mask.shape)}: give two of "
            "(b ... c h w) and one mask (b ... 1 h w)"
        )
    dtype = compute_dtype(pred, target)
    return per_sample_mse(pred, target, foreground_weight(mask.to(dtype), pred.shape[-3]))


def foreground_weight(mask: Tensor, channels: int) -> Tensor:
    """Return the weights of a mask's positions (b ... 1 h w) that make a mean squared error `foreground_mse`."""
    each = channels * mask[0].numel() / mask.flatten(1).sum(1).clamp_min(1)
    return expand_like(each, mask) * mask


@dataclass(frozen=True, eq=False)
class DiscreteObjective(Objective):
    """Base of eps and v: a discrete schedule; t is an integer step (b,)."""

    schedule: DiscreteSchedule
    min_snr: float = 0.0
    """Bound of the signal-to-noise ratio in the weight of the loss; 0: no weight."""

    @abstractmethod
    def weight(self, snr: Tensor) -> Tensor:
        """The loss's weight (b,) that makes it x0's error times min(SNR, min_snr) (Hang et al., 2303.09556, 3.4)."""

    def weigh(self, error: Tensor, t: Tensor) -> Tensor:
        """Weight by the signal-to-noise ratio (alpha / sigma)^2 if `min_snr` is not 0."""
        if not self.min_snr:
            return error
        alpha, sigma = self.schedule.at("alpha", t, error), self.schedule.at("sigma", t, error)
        return self.weight((alpha / sigma).square()) * error

    def _levels(self, t: Tensor, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(*arrays)
        return self.schedule.at("alpha", t, arrays[0], dtype), self.schedule.at("sigma", t, arrays[0], dtype)

    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        alpha, sigma = self._levels(t, x0, eps)
        return (alpha * x0 + sigma * eps).to(x0.dtype)

    def sample_t(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        require_cpu(generator)
        return torch.randint(len(self.schedule), (batch,), generator=generator).to(device)

    def timestep(self, t: Tensor) -> Tensor:
        return t.float() * (NUM_TIMESTEPS / len(self.schedule))

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return (timestep * (len(self.schedule) / NUM_TIMESTEPS)).round().long()

    def t_at(self, share: Tensor) -> Tensor:
        return (share * len(self.schedule)).long().clamp_max(len(self.schedule) - 1)


class EpsObjective(DiscreteObjective):
    """The network predicts the noise (DDPM eq. 14)."""

    def weight(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR: the error of eps is SNR times that of x0."""
        return snr.clamp_max(self.min_snr) / snr

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = (x_t - sigma eps) / alpha (DDPM eq. 4, solved for x0)."""
        alpha, sigma = self._levels(t, x_t, pred)
        return (x_t - sigma * pred) / alpha

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return pred


class VObjective(DiscreteObjective):
    """The network predicts v = alpha eps - sigma x0 (Salimans & Ho, 2022, appendix D)."""

    def weight(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma) / (SNR + 1): the error of v is SNR + 1 times that of x0."""
        return snr.clamp_max(self.min_snr) / (snr + 1)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self._levels(t, x0, eps)
        return alpha * eps - sigma * x0

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = alpha x_t - sigma v: (alpha, sigma) is a rotation."""
        alpha, sigma = self._levels(t, x_t, pred)
        return alpha * x_t - sigma * pred

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps = sigma x_t + alpha v."""
        alpha, sigma = self._levels(t, x_t, pred)
        return sigma * x_t + alpha * pred


@dataclass(frozen=True)
class FlowObjective(Objective):
    """Rectified flow (Liu et al., 2022): x_t = (1 - t) x0 + t eps, velocity eps - x0, t in [0, 1].

    With prediction "x0" the loss is that of the implied velocity (x_t - x0_hat) / max(t, t_min), as "Back to
    basics" (JiT; Li & He, 2025) recommends for pixels.
    """

    config: ObjectiveConfig

    def noise(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        s = _t_like(t, x0, eps)
        return ((1 - s) * x0 + s * eps).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0 if self.config.prediction == "x0" else eps - x0

    def weigh(self, error: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of the velocity; that of x0 is divided by max(t, t_min) squared."""
        if self.config.prediction == "velocity":
            return error
        return error / t.to(error.dtype).clamp_min(self.config.t_min).square()

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 = x_t - t v."""
        return pred if self.config.prediction == "x0" else x_t - _t_like(t, x_t, pred) * pred

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """eps = x_t + (1 - t) v; from x0, (x_t - (1 - t) x0) / t, undefined at t = 0."""
        s = _t_like(t, x_t, pred)
        if self.config.prediction == "velocity":
            return x_t + (1 - s) * pred
        return (x_t - (1 - s) * pred) / s.clamp_min(1e-6)

    def sample_t(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """float32; logit-normal (Esser et al., 2024, section 3.1) or uniform, then shifted."""
        require_cpu(generator)
        c = self.config
        if c.t_sampling == "uniform":
            u = torch.rand(batch, generator=generator)
        else:
            u = torch.sigmoid(torch.randn(batch, generator=generator) * c.logit_std + c.logit_mean)
        return shift_t(u, c.shift).to(device)

    def timestep(self, t: Tensor) -> Tensor:
        """max_timestep t; with 999 the ends 0 and 1 meet the first and last step of the discrete process."""
        return t * self.config.max_timestep

    def from_timestep(self, timestep: Tensor) -> Tensor:
        return timestep / self.config.max_timestep

    def t_at(self, share: Tensor) -> Tensor:
        return share

    def sampling_grid(self, steps: int, spacing: str = "even") -> Tensor:
        """(steps + 1,) float64 values of t from 1 to 0 for sampling, shifted.

        diffusers: the last step begins at the training's smallest t, 1 / 1000 shifted, which is then shifted again with
        all others (`FlowMatchEulerDiscreteScheduler`).
        """
        if spacing == "even":
            return shift_t(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.config.shift)
        last = shift_t(torch.tensor(1 / NUM_TIMESTEPS, dtype=torch.float64), self.config.shift)
        begins = torch.linspace(1, last.item(), steps, dtype=torch.float64)
        return torch.cat([shift_t(begins, self.config.shift), torch.zeros(1, dtype=torch.float64)])


def shift_t(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): the resolution-dependent shift (Esser et al., 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def _t_like(t: Tensor, *arrays: Tensor) -> Tensor:
    return expand_like(t.to(compute_dtype(*arrays)), arrays[0])


def make_objective(config: ObjectiveConfig) -> Objective:
    """Build the objective of a configuration."""
    if config.kind == "flow":
        return FlowObjective(config)
    betas, start, end = _BETAS[config.beta_schedule]
    start = start if config.beta_start is None else config.beta_start
    end = end if config.beta_end is None else config.beta_end
    schedule = DiscreteSchedule(betas(NUM_TIMESTEPS, start, end))
    objective = EpsObjective if config.kind == "eps" else VObjective
    return objective(schedule, config.min_snr)
