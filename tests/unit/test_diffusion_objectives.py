"""Objectives: conversions, losses, times; the same laws for every kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import FlowObjective, Objective, ObjectiveConfig, make_objective, randn, randn_like
from dit_booth.diffusion.objectives import DiscreteObjective, shift_t

torch.set_num_threads(1)
CONFIGS = {
    "eps": ObjectiveConfig(kind="eps"),
    "eps-sd": ObjectiveConfig(kind="eps", beta_schedule="scaled_linear"),
    "v": ObjectiveConfig(kind="v"),
    "flow": ObjectiveConfig(kind="flow"),
    "flow-x0": ObjectiveConfig(kind="flow", prediction="x0"),
    "flow-shift": ObjectiveConfig(kind="flow", t_sampling="uniform", shift=3.0),
}
SHAPE = (6, 2, 3, 4, 4)  # b f c h w


@pytest.fixture(params=CONFIGS)
def objective(request: pytest.FixtureRequest) -> Objective:
    return make_objective(CONFIGS[request.param])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(objective: Objective, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x0, eps, t; the times span the range, both ends included."""
    x0, eps = randn(SHAPE, generator(1), dtype=dtype), randn(SHAPE, generator(2), dtype=dtype)
    if isinstance(objective, FlowObjective):
        return x0, eps, torch.tensor([1e-3, 0.04, 0.06, 0.5, 0.9, 1.0], dtype=dtype)
    return x0, eps, torch.tensor([0, 1, 10, 500, 998, 999])


def test_the_target_converts_back_to_data_and_noise(objective: Objective) -> None:
    x0, eps, t = batch(objective)
    x_t, pred = objective.noise(x0, t, eps), objective.target(x0, eps, t)
    torch.testing.assert_close(objective.to_x0(pred, x_t, t), x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective.to_eps(pred, x_t, t), eps, rtol=1e-10, atol=1e-10)


def test_any_prediction_implies_data_and_noise_that_make_x_t(objective: Objective) -> None:
    x0, eps, t = batch(objective)
    x_t, pred = objective.noise(x0, t, eps), randn(SHAPE, generator(3), dtype=torch.float64)
    again = objective.noise(objective.to_x0(pred, x_t, t), t, objective.to_eps(pred, x_t, t))
    torch.testing.assert_close(again, x_t, rtol=1e-10, atol=1e-10)


def test_v_and_eps_are_one_model_in_two_coordinates() -> None:
    e, v = make_objective(CONFIGS["eps"]), make_objective(CONFIGS["v"])
    assert isinstance(e, DiscreteObjective)
    x0, eps, t = batch(e)
    x_t, pred = e.noise(x0, t, eps), randn(SHAPE, generator(3), dtype=torch.float64)
    as_v = v.target(e.to_x0(pred, x_t, t), pred, t)
    torch.testing.assert_close(v.to_eps(as_v, x_t, t), pred, rtol=1e-10, atol=1e-10)
    ratio = e.loss(pred, x0, eps, t) / v.loss(
        as_v, x0, eps, t
    )  # the v loss is the eps loss over alpha squared
    torch.testing.assert_close(ratio, e.schedule.alphas_cumprod[t], rtol=1e-8, atol=0)


def test_the_ends_of_a_flow_are_data_and_noise() -> None:
    flow = make_objective(CONFIGS["flow"])
    x0, eps, _ = batch(flow)
    assert torch.equal(flow.noise(x0, torch.zeros(6), eps), x0)
    assert torch.equal(flow.noise(x0, torch.ones(6), eps), eps)


def test_x0_prediction_has_the_velocity_loss_down_to_t_min() -> None:
    velocity, x0_objective = make_objective(CONFIGS["flow"]), make_objective(CONFIGS["flow-x0"])
    x0, eps, t = batch(velocity)
    x_t, x0_hat = velocity.noise(x0, t, eps), randn(SHAPE, generator(3), dtype=torch.float64)
    implied = (x_t - x0_hat) / t.reshape(-1, 1, 1, 1, 1)
    expected, ours = velocity.loss(implied, x0, eps, t), x0_objective.loss(x0_hat, x0, eps, t)
    torch.testing.assert_close(ours[2:], expected[2:], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours[:2], expected[:2] * (t[:2] / 0.05) ** 2, rtol=1e-10, atol=0)


def test_loss_is_zero_at_the_target_one_per_sample_and_independent_of_the_others(
    objective: Objective,
) -> None:
    x0, eps, t = batch(objective)
    target = objective.target(x0, eps, t)
    assert torch.equal(objective.loss(target, x0, eps, t), torch.zeros(6, dtype=torch.float64))
    pred = target + randn(SHAPE, generator(4), dtype=torch.float64)
    loss = objective.loss(pred, x0, eps, t)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert loss.shape == (6,) and (loss > 0).all()
    assert torch.equal(objective.loss(pred[order], x0[order], eps[order], t[order]), loss[order])
    torch.testing.assert_close(objective.loss(pred[2:3], x0[2:3], eps[2:3], t[2:3]), loss[2:3])


def test_loss_does_not_depend_on_the_order_of_the_axes_or_on_their_number(objective: Objective) -> None:
    x0, eps, t = batch(objective)
    pred = randn(SHAPE, generator(4), dtype=torch.float64)
    loss = objective.loss(pred, x0, eps, t)
    swapped = objective.loss(*(array.transpose(1, 2) for array in (pred, x0, eps)), t)  # type: ignore[call-arg]
    flat = objective.loss(*(array.flatten(1) for array in (pred, x0, eps)), t)  # type: ignore[call-arg]
    torch.testing.assert_close(swapped, loss)
    torch.testing.assert_close(flat, loss)


def test_gradients_reach_the_prediction_and_are_finite(objective: Objective) -> None:
    x0, eps, t = batch(objective, torch.float32)
    pred = torch.zeros(SHAPE, requires_grad=True)
    objective.loss(pred, x0, eps, t).mean().backward()
    assert pred.grad is not None and pred.grad.isfinite().all()
    assert (pred.grad.flatten(1).abs().amax(1) > 0).all()


def test_half_precision_is_computed_in_float32(objective: Objective) -> None:
    x0, eps, t = batch(objective, torch.float32)
    t = t.float() if t.is_floating_point() else t
    low = objective.noise(x0.bfloat16(), t, eps.bfloat16())
    exact = objective.noise(x0.bfloat16().float(), t, eps.bfloat16().float())
    assert low.dtype == torch.bfloat16 and torch.equal(low, exact.bfloat16())
    loss = objective.loss(x0.bfloat16(), x0, eps, t)
    assert loss.dtype == torch.float32


def test_times_and_timesteps_stay_within_their_bounds(objective: Objective) -> None:
    t = objective.sample_t(20_000, generator())
    step = objective.timestep(t)
    assert t.shape == step.shape == (20_000,) and step.is_floating_point()
    assert step.min() >= 0 and step.max() < 1000
    torch.testing.assert_close(objective.from_timestep(step), t)
    _, _, ends = batch(objective)
    assert objective.timestep(ends).min() >= 0 and objective.timestep(ends).max() == 999


def test_times_come_from_the_generator_alone(objective: Objective) -> None:
    first = objective.sample_t(32, generator(7))
    torch.manual_seed(1)
    assert torch.equal(objective.sample_t(32, generator(7)), first)
    assert not torch.equal(objective.sample_t(32, generator(8)), first)


def test_discrete_times_cover_every_step() -> None:
    assert len(make_objective(CONFIGS["eps"]).sample_t(20_000, generator()).unique()) == 1000


def test_logit_normal_times_have_their_mean_and_spread() -> None:
    flow = make_objective(ObjectiveConfig(kind="flow", logit_mean=0.8, logit_std=0.8))
    logits = torch.logit(flow.sample_t(50_000, generator()))
    assert logits.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logits.std().item() == pytest.approx(0.8, abs=0.02)


def test_shift_moves_time_towards_noise_and_keeps_the_ends() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_t(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    assert (shifted[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(shift_t(shifted, 1 / 3), t)
    assert torch.equal(shift_t(t, 1.0), t)


def test_noise_draws_are_equal_in_every_dtype() -> None:
    draws = [randn_like(torch.empty(3, 4, dtype=d), generator()) for d in (torch.float32, torch.float64)]
    assert torch.equal(draws[0], draws[1].float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "x"}, "kind='x': choose eps or v or flow"),
        ({"kind": "eps", "prediction": "x0"}, "belongs to kind=flow"),
        ({"kind": "flow", "prediction": "noise"}, "prediction='noise'"),
        ({"kind": "flow", "t_min": 0.0}, "t_min is 0.0"),
        ({"kind": "flow", "t_min": 1.0}, "t_min is 1.0"),
        ({"kind": "flow", "shift": -1.0}, "shift is -1.0"),
        ({"kind": "flow", "logit_std": float("nan")}, "logit_std is nan"),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5, beta_end=0.1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_objective(ObjectiveConfig(**options))  # type: ignore[arg-type]


def test_a_prediction_of_another_shape_is_refused() -> None:
    objective = make_objective(CONFIGS["eps"])
    x0, eps, t = batch(objective)
    with pytest.raises(ValueError, match="drop variance channels"):
        objective.loss(torch.cat([x0, x0], 2), x0, eps, t)


def test_beta_defaults_follow_the_schedule() -> None:
    objective = make_objective(CONFIGS["eps-sd"])
    assert isinstance(objective, DiscreteObjective)
    assert objective.schedule.betas[[0, -1]].tolist() == pytest.approx([0.00085, 0.012])
