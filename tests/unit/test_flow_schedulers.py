"""Sampling of flows as diffusers' schedulers do it, on a small nonlinear velocity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, SamplerConfig, invert, make_objective, sample
from dit_booth.diffusion.frame_queue import FrameSteps
from dit_booth.diffusion.objectives import FlowObjective

torch.set_num_threads(1)
STEPS = (1, 2, 10, 50)


def flow(shift: float) -> FlowObjective:
    objective = make_objective(ObjectiveConfig(kind="flow", shift=shift, max_timestep=1000))
    assert isinstance(objective, FlowObjective)
    return objective


def velocity(x: Tensor, timestep: Tensor) -> Tensor:
    """Stand for a network: it depends on x and on the timestep, smoothly."""
    return torch.tanh(x.flip(-1)) + 0.3 * x * torch.cos(timestep / 200).reshape(-1, 1, 1, 1, 1).to(x.dtype)


def by_diffusers(scheduler: Any, steps: int, x: Tensor) -> Tensor:
    """WanPipeline's loop."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        pred = velocity(x, timestep.expand(len(x)))
        x = scheduler.step(pred, timestep, x, return_dict=False)[0]
    return x


def noise() -> Tensor:
    return torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
def test_euler_is_diffusers_flow_matching_scheduler(shift: float, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    config = SamplerConfig(kind="euler", steps=steps, spacing="diffusers")
    x = sample(velocity, flow(shift), config, noise())
    torch.testing.assert_close(x, by_diffusers(scheduler, steps, noise()), rtol=1e-5, atol=2e-6)
    grid = flow(shift).sampling_grid(steps, "diffusers")
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", STEPS)
def test_unipc_is_diffusers_scheduler(shift: float, steps: int) -> None:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    x = sample(velocity, flow(shift), SamplerConfig(kind="unipc", steps=steps), noise())
    torch.testing.assert_close(x, by_diffusers(scheduler, steps, noise()), rtol=1e-5, atol=1e-5)


def test_unipc_is_nearer_to_the_limit_than_euler() -> None:
    objective, x = flow(3.0), noise().double()
    limit = sample(velocity, objective, SamplerConfig(kind="heun", steps=400), x)
    errors = [
        (sample(velocity, objective, SamplerConfig(kind=kind, steps=20), x) - limit).abs().max()  # type: ignore[arg-type]
        for kind in ("euler", "unipc")
    ]
    assert errors[1] < 0.2 * errors[0]


def test_euler_with_diffusers_grid_goes_backwards() -> None:
    objective, config = flow(3.0), SamplerConfig(kind="euler", steps=40, spacing="diffusers")
    x0 = noise().double()
    found = sample(velocity, objective, config, invert(velocity, objective, config, x0, refine=20))
    torch.testing.assert_close(found, x0, rtol=1e-6, atol=1e-6)


def test_unipc_takes_all_steps_or_none() -> None:
    config = SamplerConfig(kind="unipc", steps=4)
    with pytest.raises(ValueError, match=r"unipc.*cannot take a part of them; use euler"):
        sample(velocity, flow(1.0), config, noise(), steps=range(1, 4))
    with pytest.raises(ValueError, match=r"unipc, which uses all frames' earlier steps.*use euler"):
        FrameSteps(flow(1.0), config)
    with pytest.raises(ValueError, match="kind=unipc does not fit EpsObjective"):
        sample(velocity, make_objective(ObjectiveConfig(kind="eps")), config, noise())


def test_the_largest_timestep_is_an_option() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    assert flow(1.0).timestep(t).tolist() == [0, 250, 1000]
    assert make_objective(ObjectiveConfig(kind="flow")).timestep(t).tolist() == [0, 249.75, 999]
    torch.testing.assert_close(flow(1.0).from_timestep(flow(1.0).timestep(t)), t)
