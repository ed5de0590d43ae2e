"""Samplers on Gaussian data N(mu, s^2), whose optimal denoiser is known in closed form; options."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import (
    FlowObjective,
    Objective,
    ObjectiveConfig,
    SamplerConfig,
    make_objective,
    randn,
    sample,
)
from dit_booth.diffusion.objectives import DiscreteObjective
from dit_booth.diffusion.samplers import euler_step

torch.set_num_threads(1)
MU, S = 0.7, 0.5
EPS = make_objective(ObjectiveConfig(kind="eps"))
V = make_objective(ObjectiveConfig(kind="v"))
FLOW = make_objective(ObjectiveConfig(kind="flow"))
FLOW_X0 = make_objective(ObjectiveConfig(kind="flow", prediction="x0"))
SHIFTED = make_objective(ObjectiveConfig(kind="flow", shift=3.0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(objective: Objective, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise level at t, from the definitions."""
    if isinstance(objective, DiscreteObjective):
        abar = objective.schedule.alphas_cumprod[t]
        a, sigma = abar.sqrt(), (1 - abar).sqrt()
    else:
        a, sigma = 1 - t, t
    shape = (-1,) + (1,) * (x.ndim - 1)
    return a.to(x.dtype).reshape(shape), sigma.to(x.dtype).reshape(shape)


class Optimal:
    """E[prediction | x_t] for data N(MU, S^2), in the objective's coordinates; counts its calls."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.calls, self.timesteps = objective, 0, []

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        self.timesteps.append(timestep[0].item())
        t = self.objective.from_timestep(timestep)
        a, sigma = levels(self.objective, t, x)
        variance = a**2 * S**2 + sigma**2
        x0 = MU + a * S**2 / variance * (x - a * MU)
        eps = sigma / variance * (x - a * MU)
        return self.objective.target(x0, eps, t)


def run(objective: Objective, config: SamplerConfig, n: int = 20_000) -> Tensor:
    noise = randn((n, 1), generator(1), dtype=torch.float64)
    return sample(Optimal(objective), objective, config, noise, generator(2))


@pytest.mark.parametrize(
    ("objective", "config"),
    [
        (EPS, SamplerConfig(kind="ddpm", steps=250)),
        (V, SamplerConfig(kind="ddpm", steps=250)),
        (EPS, SamplerConfig(kind="ddim", steps=250)),
        (V, SamplerConfig(kind="ddim", steps=250)),
        (EPS, SamplerConfig(kind="ddim", steps=250, eta=1.0)),
        (EPS, SamplerConfig(kind="ddim", steps=250, spacing="ddim")),
        (V, SamplerConfig(kind="ddim", steps=250, spacing="100,80,70")),
        (FLOW, SamplerConfig(kind="euler", steps=250)),
        (FLOW_X0, SamplerConfig(kind="euler", steps=250)),
        (SHIFTED, SamplerConfig(kind="euler", steps=250)),
        (FLOW, SamplerConfig(kind="euler", steps=250, eta=0.5)),
        (FLOW_X0, SamplerConfig(kind="euler", steps=250, eta=1.0)),
        (SHIFTED, SamplerConfig(steps=250, eta=1.0)),
        (FLOW, SamplerConfig(kind="heun", steps=50)),
        (FLOW_X0, SamplerConfig(kind="heun", steps=50)),
        (SHIFTED, SamplerConfig(kind="heun", steps=50)),
    ],
    ids=lambda value: (
        f"{value.kind}-{value.spacing}-{value.eta}" if isinstance(value, SamplerConfig) else None
    ),
)
def test_every_sampler_recovers_a_gaussian(objective: Objective, config: SamplerConfig) -> None:
    x = run(objective, config)
    assert x.mean().item() == pytest.approx(MU, abs=0.02)
    assert x.std().item() == pytest.approx(S, abs=0.02)


@pytest.mark.parametrize(
    ("objective", "kind"), [(EPS, "ddim"), (EPS, "ddpm"), (FLOW, "euler"), (FLOW, "heun")]
)
def test_predictions_in_other_coordinates_give_the_same_sample(objective: Objective, kind: str) -> None:
    other = V if objective is EPS else FLOW_X0
    config = SamplerConfig(kind=kind, steps=20)  # type: ignore[arg-type]
    torch.testing.assert_close(run(objective, config, 64), run(other, config, 64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.7, 0.5), (0.4, 0.1)])
def test_an_ancestral_step_draws_from_the_posterior(t: float, s: float) -> None:
    """x_s given x_t and x0 by Bayes' rule, where x_t is x_s with its signal scaled down and noise added."""
    x0, x_t, noise = randn((3, 5), generator(3), dtype=torch.float64)
    scale = (1 - t) / (1 - s)
    added = t**2 - scale**2 * s**2
    variance = 1 / (1 / s**2 + scale**2 / added)
    mean = variance * ((1 - s) * x0 / s**2 + scale * x_t / added)
    expected = mean + variance**0.5 * noise
    torch.testing.assert_close(euler_step(x0, x_t, t, s, 1.0, noise), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", [FLOW, FLOW_X0, SHIFTED])
def test_euler_is_first_order_and_heun_second(objective: Objective) -> None:
    noise = randn((64, 1), generator(1), dtype=torch.float64)
    exact = MU + S * noise  # the flow transports N(0, 1) to N(MU, S^2) monotonically
    for kind, order in (("euler", 1), ("heun", 2)):
        errors = []
        for steps in (20, 40, 80, 160):
            config = SamplerConfig(kind=kind, steps=steps)  # type: ignore[arg-type]
            errors.append((sample(Optimal(objective), objective, config, noise) - exact).abs().max().item())
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2**order, rel=0.2)


def test_ddim_converges_to_the_exact_flow() -> None:
    noise = randn((64, 1), generator(1), dtype=torch.float64)
    assert isinstance(EPS, DiscreteObjective)
    a, sigma = EPS.schedule.alpha[-1], EPS.schedule.sigma[-1]
    exact = MU + S * (noise - a * MU) / (a**2 * S**2 + sigma**2).sqrt()
    errors = [
        (sample(Optimal(EPS), EPS, SamplerConfig(steps=steps), noise) - exact).abs().max().item()
        for steps in (10, 100, 1000)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]


@pytest.mark.parametrize(
    ("objective", "kind", "calls"),
    [(EPS, "ddpm", 7), (EPS, "ddim", 7), (FLOW, "euler", 7), (FLOW, "heun", 13)],
)
def test_network_calls_timesteps_and_callback(objective: Objective, kind: str, calls: int) -> None:
    model, seen = Optimal(objective), []
    noise = randn((2, 2, 3, 4, 4), generator(1))
    config = SamplerConfig(kind=kind, steps=7)  # type: ignore[arg-type]
    x = sample(model, objective, config, noise, generator(), lambda step, x, x0: seen.append((step, x, x0)))
    assert x.shape == noise.shape and x.dtype == noise.dtype
    assert model.calls == calls
    assert model.timesteps[0] == 999 and min(model.timesteps) >= 0
    assert [step for step, _, _ in seen] == list(range(7))
    assert torch.equal(seen[-1][1], x)
    torch.testing.assert_close(seen[-1][2], x)  # the last step lands on the estimate
    assert torch.equal(noise, randn((2, 2, 3, 4, 4), generator(1)))  # not written to


def test_one_step_is_the_first_estimate() -> None:
    noise = randn((4, 3), generator(1), dtype=torch.float64)
    torch.testing.assert_close(
        sample(Optimal(FLOW), FLOW, SamplerConfig(steps=1), noise), torch.full_like(noise, MU)
    )


@pytest.mark.parametrize(
    ("objective", "kind"), [(EPS, "ddpm"), (V, "ddim"), (FLOW, "euler"), (FLOW_X0, "heun")]
)
def test_clipping_bounds_every_estimate_and_the_result(objective: Objective, kind: str) -> None:
    estimates: list[Tensor] = []
    config = SamplerConfig(kind=kind, steps=10, clip_x0=0.625)  # type: ignore[arg-type]
    noise = randn((256, 1), generator(1))
    x = sample(
        Optimal(objective), objective, config, noise, generator(), lambda i, x, x0: estimates.append(x0)
    )
    assert max(x0.abs().max().item() for x0 in estimates) <= 0.625
    assert x.abs().max() <= 0.625 + 1e-5
    assert (x > 0.62).any()


def test_same_seed_same_sample_and_global_state_is_untouched() -> None:
    config = SamplerConfig(kind="ddpm", steps=5)
    state = torch.get_rng_state()
    first, second = run(EPS, config, 8), run(EPS, config, 8)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_called_before_the_sampler_draws() -> None:
    """VideoBooth draws the reference's noise, inside the model call, before the video's."""
    shared, inside, model = generator(3), [], Optimal(EPS)

    def noisy(x: Tensor, t: Tensor) -> Tensor:
        inside.append(randn((1,), shared))
        return model(x, t)

    sample(noisy, EPS, SamplerConfig(kind="ddpm", steps=2), randn((1, 1), generator(1)), shared)
    again = generator(3)
    assert torch.equal(inside[0], randn((1,), again))
    randn((1, 1), again)
    assert torch.equal(inside[1], randn((1,), again))


def test_half_precision_keeps_its_state_in_float32() -> None:
    dtypes, noise = set(), randn((8, 2), generator(1), dtype=torch.bfloat16)

    def model(x: Tensor, t: Tensor) -> Tensor:
        dtypes.add(x.dtype)
        return x

    states: list[torch.dtype] = []
    x = sample(model, EPS, SamplerConfig(steps=3), noise, callback=lambda i, x, x0: states.append(x.dtype))
    assert dtypes == {torch.bfloat16} and set(states) == {torch.float32} and x.dtype == torch.bfloat16


def test_sampling_keeps_no_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    x = sample(lambda x, t: x * weight, EPS, SamplerConfig(steps=2), randn((2, 2), generator()))
    assert not x.requires_grad


@pytest.mark.parametrize("flow", [FLOW, FLOW_X0])
def test_discrete_samplers_do_not_fit_a_flow(flow: FlowObjective) -> None:
    for kind in ("ddpm", "ddim"):
        with pytest.raises(ValueError, match=f"kind={kind} does not fit FlowObjective; choose euler or heun"):
            sample(Optimal(flow), flow, SamplerConfig(kind=kind), torch.zeros(1, 1), generator())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="spacing"):
        sample(Optimal(flow), flow, SamplerConfig(spacing="ddim"), torch.zeros(1, 1), generator())


@pytest.mark.parametrize("kind", ["euler", "heun"])
def test_flow_samplers_do_not_fit_a_discrete_process(kind: str) -> None:
    with pytest.raises(ValueError, match=f"kind={kind} does not fit EpsObjective; choose ddim or ddpm"):
        sample(Optimal(EPS), EPS, SamplerConfig(kind=kind), torch.zeros(1, 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [SamplerConfig(kind="ddpm"), SamplerConfig(eta=0.5)])
def test_random_samplers_need_a_generator(config: SamplerConfig) -> None:
    with pytest.raises(ValueError, match="generator is missing"):
        sample(Optimal(EPS), EPS, config, torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "plms"}, "kind='plms'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "spacing='1001'"),
        ({"eta": 2.0}, "eta is 2.0"),
        ({"kind": "ddpm", "eta": 0.5}, "belongs to kind=ddim or euler"),
        ({"kind": "heun", "eta": 0.5}, "belongs to kind=ddim or euler"),
        ({"clip_x0": 0.0}, "clip_x0 is 0.0"),
        ({"spacing": "10,15,20"}, "makes 45 steps, not steps=50; use 45"),
        ({"spacing": "often"}, "spacing='often'"),
        ({"steps": 60, "spacing": "ddim"}, "choose a divisor of 1000"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(Optimal(EPS), EPS, SamplerConfig(**options), torch.zeros(1, 1), generator())  # type: ignore[arg-type]


def test_a_model_of_another_output_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="drop variance channels"):
        sample(lambda x, t: torch.cat([x, x], 1), EPS, SamplerConfig(steps=1), torch.zeros(1, 4))
