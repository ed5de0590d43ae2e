"""From noise to data: DDPM and DDIM over a respaced discrete process, Euler, Heun and UniPC along a flow.

Every sampler uses only the network's estimate of x0, which `clip_x0` may clamp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dit_booth.diffusion.noise import Generators, compute_dtype, expand_like, randn_like
from dit_booth.diffusion.objectives import DiscreteObjective, FlowObjective, Objective
from dit_booth.diffusion.schedule import NUM_TIMESTEPS, DiscreteSchedule
from dit_booth.errors import check_ranges

Model = Callable[[Tensor, Tensor], Tensor]
"""model(x_t (b ...), timestep (b,) in [0, 1000)) -> prediction (b ...)."""
Callback = Callable[[int, Tensor, Tensor], None]
"""callback(step, x after the step, estimate of x0), step counting from 0."""


class Denoiser(Protocol):
    """denoise(x_t, t in the objective's units) -> estimate of x0; `timestep` is the network's, if not that of t."""

    def __call__(self, x: Tensor, t: Tensor, timestep: Tensor | None = None) -> Tensor: ...


SamplerKind = Literal["ddpm", "ddim", "euler", "heun", "unipc"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Options of the sampler."""

    kind: Literal["auto", "ddpm", "ddim", "euler", "heun", "unipc"] = "auto"
    """ddpm, ddim for eps and v; euler, heun, unipc for flow; auto: ddim or euler. VideoBooth: ddpm, 250 steps; Wan 2.1:
    unipc, 50 steps."""
    steps: int = 50
    """Sampling steps. heun evaluates the network 2 * steps - 1 times."""
    eta: float = 0.0
    """ddim, euler: fresh noise per step, 0 deterministic, 1 ancestral."""
    spacing: str = "even"
    """ddpm, ddim: even (both ends included), ddim (constant stride from 0), or counts such as 10,15,20. euler, heun:
    even, or diffusers, whose last step is the training's smallest t."""
    clip_x0: float | None = None
    """Clamp every estimate of x0 to [-clip_x0, clip_x0]; pixel space: 1."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        if self.kind not in ("auto", *get_args(SamplerKind)):
            raise ValueError(f"kind={self.kind!r}: choose auto, ddpm, ddim, euler, heun or unipc")
        check_ranges(self, "sampler", steps="[1, 100000]", eta="[0, 1]", clip_x0="(0, 1000000]")
        if self.eta > 0 and self.kind not in ("auto", "ddim", "euler"):
            raise ValueError(f"eta={self.eta} belongs to kind=ddim or euler, not to {self.kind}; use eta=0")


@torch.no_grad()
def sample(
    model: Model,
    objective: Objective,
    config: SamplerConfig,
    noise: Tensor,
    generator: Generators | None = None,
    callback: Callback | None = None,
    steps: range | None = None,
) -> Tensor:
    """Run the sampler from `noise` (b ...), standard normal, to an estimate of x0 of equal shape and dtype.

    steps: a part of the config's steps alone, from latents at its first step's level to those after its last.

    generator: on the CPU, one or one per row; needed by ddpm, and with eta > 0. In every step the model runs
    before the sampler draws. The state is kept in float32 at least; the model sees the dtype of `noise`.
    Raises ValueError if the sampler does not fit the objective.
    """
    kind = resolve_kind(config, objective)
    if generator is None and (kind == "ddpm" or config.eta > 0):
        raise ValueError(
            f"generator is missing: {kind} draws noise in every step; pass a CPU torch.Generator"
        )
    denoise = _denoiser(model, objective, config, noise.dtype)
    x = noise.to(compute_dtype(noise))
    report = callback or (lambda step, x, x0: None)
    if isinstance(objective, FlowObjective):
        if kind == "unipc":
            x = _sample_unipc(denoise, objective, config, x, report, steps)
        else:
            x = _sample_flow(denoise, objective, config, kind, x, generator, report, steps)
    else:
        assert isinstance(objective, DiscreteObjective)
        x = _sample_discrete(denoise, objective, config, kind, x, generator, report, steps)
    return x.to(noise.dtype)


def time_before(objective: Objective, config: SamplerConfig, step: int) -> Tensor:
    """Return the noise level at which a step begins, a scalar in the objective's units of t."""
    if isinstance(objective, FlowObjective):
        return objective.sampling_grid(config.steps, config.spacing)[step]
    assert isinstance(objective, DiscreteObjective)
    spaced = objective.schedule.respace(section_counts(config))
    return spaced.timestep_map[len(spaced) - 1 - step]


def resolve_kind(config: SamplerConfig, objective: Objective) -> SamplerKind:
    """Resolve `auto`. Raises ValueError, naming those that fit, for a sampler of the other family."""
    flow = isinstance(objective, FlowObjective)
    fitting = ("euler", "heun", "unipc") if flow else ("ddim", "ddpm")
    kind = fitting[0] if config.kind == "auto" else config.kind
    if kind not in fitting:
        raise ValueError(
            f"kind={kind} does not fit {type(objective).__name__}; choose {' or '.join(fitting)}"
        )
    if flow and config.spacing not in ("even", "diffusers"):
        raise ValueError(
            f"spacing={config.spacing!r} belongs to ddpm and ddim; a flow takes spacing='even' or 'diffusers'"
        )
    return kind  # type: ignore[return-value]


def _denoiser(model: Model, objective: Objective, config: SamplerConfig, dtype: torch.dtype) -> Denoiser:
    def denoise(x: Tensor, t: Tensor, timestep: Tensor | None = None) -> Tensor:
        pred = model(x.to(dtype), objective.timestep(t) if timestep is None else timestep)
        if pred.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(pred.shape)} for an input of shape {tuple(x.shape)}: "
                "they must be equal (drop variance channels first)"
            )
        x0 = objective.to_x0(pred.to(x.dtype), x, t)
        return x0 if config.clip_x0 is None else x0.clamp(-config.clip_x0, config.clip_x0)

    return denoise


# ---- discrete processes ----


def section_counts(config: SamplerConfig) -> str:
    """Return the section counts for `DiscreteSchedule.respace`. Raises ValueError if they do not sum to `steps`."""
    if config.spacing in ("even", "ddim"):
        return f"{'' if config.spacing == 'even' else 'ddim'}{config.steps}"
    try:
        total = sum(int(part) for part in config.spacing.split(","))
    except ValueError:
        raise ValueError(
            f"spacing={config.spacing!r}: write even, ddim, or counts such as 10,15,20"
        ) from None
    if total != config.steps:
        raise ValueError(
            f"spacing={config.spacing!r} makes {total} steps, not steps={config.steps}; use {total}"
        )
    return config.spacing


def _sample_discrete(
    denoise: Denoiser,
    objective: DiscreteObjective,
    config: SamplerConfig,
    kind: SamplerKind,
    x: Tensor,
    generator: Generators | None,
    report: Callback,
    steps: range | None,
) -> Tensor:
    spaced = objective.schedule.respace(section_counts(config))
    for step, i in enumerate(reversed(range(len(spaced)))):
        if steps is not None and step not in steps:
            continue
        index = torch.full((len(x),), i, device=x.device)
        x0 = denoise(x, torch.full_like(index, int(spaced.timestep_map[i])))
        fresh = (
            None if generator is None or (kind == "ddim" and config.eta == 0) else randn_like(x, generator)
        )
        x = (
            ddpm_step(spaced, x0, x, index, fresh)
            if kind == "ddpm"
            else ddim_step(spaced, x0, x, index, config.eta, fresh)
        )
        report(step, x, x0)
    return x


def ddpm_step(schedule: DiscreteSchedule, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
    """x_{t-1} ~ N(posterior mean, fixed-large variance) (DDPM algorithm 2); step 0 adds no noise.

    x0: the estimate at x_t (b ...); t: (b,) steps of `schedule`.
    """
    mean = schedule.posterior_mean(x0, x_t, t)
    if noise is None:
        return mean
    std = schedule.at("fixed_large_variance", t, x_t).sqrt()
    return mean + _not_last(t, x_t) * std * noise


def ddim_step(
    schedule: DiscreteSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_{t-1} = sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1} - s^2) eps + s noise (DDIM).

    s = eta sqrt((1 - abar_{t-1}) / (1 - abar_t)) sqrt(1 - abar_t / abar_{t-1}); eps follows from x0 and x_t.
    Song et al., 2021, eqs. 12 and 16. x0: the estimate at x_t (b ...); t: (b,) steps of `schedule`.
    """
    eps = (x_t - schedule.at("alpha", t, x_t) * x0) / schedule.at("sigma", t, x_t)
    before = schedule.at("alphas_cumprod_prev", t, x_t)
    variance = eta**2 * schedule.at("posterior_variance", t, x_t)
    x = before.sqrt() * x0 + (1 - before - variance).clamp_min(0).sqrt() * eps
    return x if noise is None else x + _not_last(t, x_t) * variance.sqrt() * noise


def _not_last(t: Tensor, x: Tensor) -> Tensor:
    """1 where t > 0, else 0, broadcastable against x."""
    return expand_like((t > 0).to(x.dtype), x)


# ---- flows ----


def _sample_flow(
    denoise: Denoiser,
    objective: FlowObjective,
    config: SamplerConfig,
    kind: SamplerKind,
    x: Tensor,
    generator: Generators | None,
    report: Callback,
    steps: range | None,
) -> Tensor:
    grid = objective.sampling_grid(config.steps, config.spacing).tolist()
    for step, (t, s) in enumerate(pairwise(grid)):
        if steps is not None and step not in steps:
            continue
        x0 = denoise(x, _full(x, t))
        fresh = None if generator is None or config.eta == 0 or s == 0 else randn_like(x, generator)
        after = euler_step(x0, x, t, s, config.eta, fresh)
        if kind == "heun" and s > 0:
            after = heun_step(x0, x, denoise(after, _full(x, s)), after, t, s)
        x = after
        report(step, x, x0)
    return x


def _sample_unipc(
    denoise: Denoiser,
    objective: FlowObjective,
    config: SamplerConfig,
    x: Tensor,
    report: Callback,
    steps: range | None,
) -> Tensor:
    """UniPC of order 2 (Zhao et al., arXiv 2302.04867) by diffusers' scheduler, which cuts timesteps to whole numbers.

    ValueError: only a part of the steps is asked for.
    """
    from diffusers import UniPCMultistepScheduler

    if steps not in (None, range(config.steps)):
        raise ValueError(
            "sampler.kind is unipc, whose steps use earlier ones: it cannot take a part of them; use euler"
        )
    made: Any = UniPCMultistepScheduler
    scheduler: Any = made(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=objective.config.shift
    )
    scheduler.set_timesteps(config.steps)
    scheduler.set_begin_index(0)  # whole timesteps may repeat
    scale = objective.config.max_timestep / NUM_TIMESTEPS
    for step, (timestep, t) in enumerate(zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False)):
        x0 = denoise(x, _full(x, t), _full(x, float(timestep) * scale))
        x = scheduler.step((x - x0) / t, timestep, x, return_dict=False)[0]
        report(step, x, x0)
    return x


def _full(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=x.dtype)


def euler_step(
    x0: Tensor,
    x_t: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """x_t + (s - t) v with v = (x_t - x0) / t, written so that s = 0 gives exactly x0.

    Without noise that is (1 - s) x0 + s eps. With it, the share eta^2 (1 - ((1 - t) s / ((1 - s) t))^2) of the variance
    of s eps is fresh (DDIM, Song et al., 2021, eqs. 12 and 16, with the flow's signal 1 - t and noise t).
    t, s: numbers, or tensors that broadcast against x_t.
    """
    if noise is None:
        return x0 + (s / t) * (x_t - x0)
    share = eta**2 * (1 - ((1 - t) * s / ((1 - s) * t)) ** 2)
    eps = (x_t - (1 - t) * x0) / t
    kept, fresh = (1 - share) ** 0.5, share**0.5
    return (1 - s) * x0 + s * (kept * eps + fresh * noise)


def heun_step(x0: Tensor, x_t: Tensor, x0_s: Tensor, x_s: Tensor, t: float, s: float) -> Tensor:
    """The trapezoid x_t + (s - t) (v_t + v_s) / 2 with v_s at Euler's x_s (Karras et al., 2022, alg. 1)."""
    return x_t + (s - t) * ((x_t - x0) / t + (x_s - x0_s) / s) / 2
