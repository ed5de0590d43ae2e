"""Diffusion: schedules, objectives, samplers and guidance, on tensors only."""

from dit_booth.diffusion.guidance import GuidanceConfig, guide
from dit_booth.diffusion.inversion import invert
from dit_booth.diffusion.noise import randn, randn_like
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.objectives import (
    EpsObjective,
    FlowObjective,
    Objective,
    VObjective,
    make_objective,
)
from dit_booth.diffusion.samplers import SamplerConfig, sample
from dit_booth.diffusion.schedule import (
    NUM_TIMESTEPS,
    DiscreteSchedule,
    linear_betas,
    scaled_linear_betas,
    spaced_steps,
)

__all__ = [
    "NUM_TIMESTEPS",
    "DiscreteSchedule",
    "EpsObjective",
    "FlowObjective",
    "GuidanceConfig",
    "Objective",
    "ObjectiveConfig",
    "SamplerConfig",
    "VObjective",
    "guide",
    "invert",
    "linear_betas",
    "make_objective",
    "randn",
    "randn_like",
    "sample",
    "scaled_linear_betas",
    "spaced_steps",
]
