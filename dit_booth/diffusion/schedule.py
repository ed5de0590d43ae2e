"""The discrete Gaussian process: betas, respacing, posterior. Tables are float64 on the CPU.

Symbols as in DDPM (Ho et al., 2020): abar_t = prod_{s<=t} (1 - beta_s); the signal level is
alpha = sqrt(abar_t) and the noise level sigma = sqrt(1 - abar_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_booth.diffusion.noise import expand_like

NUM_TIMESTEPS = 1000
"""Steps of the training process, and the scale of the timestep that a network's embedding receives."""

BetaSchedule = Literal["linear", "scaled_linear"]


def linear_betas(n: int = NUM_TIMESTEPS, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """(n,) float64, evenly spaced: DDPM section 4; the process of VideoBooth, DiT and Latte."""
    _check_betas(n, start, end)
    return torch.linspace(start, end, n, dtype=torch.float64)


def scaled_linear_betas(n: int = NUM_TIMESTEPS, start: float = 8.5e-4, end: float = 0.012) -> Tensor:
    """(n,) float64, evenly spaced in the square root: the process of Stable Diffusion 1.x."""
    _check_betas(n, start, end)
    return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64).square()


def _check_betas(n: int, start: float, end: float) -> None:
    if n < 1:
        raise ValueError(f"n={n}: a schedule needs at least one step")
    if not 0 < start <= end < 1:
        raise ValueError(f"beta_start={start}, beta_end={end}: choose 0 < beta_start <= beta_end < 1")


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """The process q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) over n steps (DDPM eq. 4).

    Every table has shape (n,) and is indexed by the step 0 .. n-1, step 0 being the least noisy.
    """

    betas: Tensor
    """(n,) float64, each within (0, 1)."""
    timestep_map: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """(n,) int64: the step of the training process that each step stands for; the identity if not given."""
    _cache: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.betas.ndim != 1 or not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError("betas must be a vector of values within (0, 1); see linear_betas()")
        if self.timestep_map.numel() == 0:
            object.__setattr__(self, "timestep_map", torch.arange(len(self.betas)))
        if len(self.timestep_map) != len(self.betas):
            raise ValueError(
                f"timestep_map has {len(self.timestep_map)} entries, betas {len(self.betas)}; they must be equal"
            )

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar_t = prod_{s<=t} (1 - beta_s)."""
        return torch.cumprod(1 - self.betas.double(), dim=0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """abar_{t-1}, with 1 before step 0."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def alpha(self) -> Tensor:
        """Signal level sqrt(abar_t)."""
        return self.alphas_cumprod.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """Noise level sqrt(1 - abar_t)."""
        return (1 - self.alphas_cumprod).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0) (DDPM eq. 7): beta_t (1 - abar_{t-1}) / (1 - abar_t)."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Weight of x_0 in the posterior mean (DDPM eq. 7)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Weight of x_t in the posterior mean (DDPM eq. 7)."""
        return (1 - self.alphas_cumprod_prev) * (1 - self.betas).sqrt() / (1 - self.alphas_cumprod)

    @cached_property
    def fixed_large_variance(self) -> Tensor:
        """beta_t as the reverse variance (DDPM section 3.2); step 0 takes step 1's posterior variance."""
        return (
            torch.cat([self.posterior_variance[1:2], self.betas[1:]]) if len(self) > 1 else self.betas.clone()
        )

    def at(self, table: str, t: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the entries `t` (b,) or (b f), integers, of the named table, shaped to broadcast against `x`."""
        key = (table, t.device, dtype or x.dtype)
        if key not in self._cache:
            self._cache[key] = getattr(self, table).to(key[2]).to(t.device)
        return expand_like(self._cache[key][t], x)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM eq. 4). x0, eps: (b ...); t: (b,) integers."""
        return self.at("alpha", t, x0) * x0 + self.at("sigma", t, x0) * eps

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM eq. 7)."""
        c1, c2 = self.at("posterior_mean_coef1", t, x_t), self.at("posterior_mean_coef2", t, x_t)
        return c1 * x0 + c2 * x_t

    def respace(self, sections: str | Sequence[int]) -> DiscreteSchedule:
        """Return the sub-process that visits only some steps, with abar unchanged at each (see `spaced_steps`).

        Its betas are 1 - abar_t / abar_s, s the step visited before t (Nichol & Dhariwal, 2021, section 4).
        """
        steps = torch.tensor(spaced_steps(len(self), sections))
        kept = self.alphas_cumprod[steps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        return DiscreteSchedule(1 - kept / before, self.timestep_map[steps])


def spaced_steps(n: int, sections: str | Sequence[int]) -> list[int]:
    """Return the steps of a process of `n` steps that a respaced process visits, ascending.

    sections: "50" (50 steps, first and last included), "10,15,20" (the process cut into three equal sections
    with 10, 15 and 20 steps), or "ddim50" (a constant integer stride from 0; Song et al., 2021, appendix D).
    Raises ValueError for a count that the process cannot give.
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        return _strided_steps(n, _parse_counts(sections.removeprefix("ddim"))[0])
    counts = _parse_counts(sections) if isinstance(sections, str) else list(sections)
    base, extra = divmod(n, len(counts))
    steps: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = base + (1 if i < extra else 0)
        if not 1 <= count <= size:
            raise ValueError(
                f"spacing={sections!r}: section {i} has {size} steps, cannot take {count} of them"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        steps += [start + round(j * stride) for j in range(count)]
        start += size
    return steps


def _strided_steps(n: int, count: int) -> list[int]:
    for stride in range(1, n + 1):
        if len(range(0, n, stride)) == count:
            return list(range(0, n, stride))
    raise ValueError(
        f"spacing='ddim{count}': no integer stride visits {count} of {n} steps; choose a divisor of {n}"
    )


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"spacing={text!r}: write '50', '10,15,20' or 'ddim50'") from None
