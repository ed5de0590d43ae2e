"""Inversion: sampling from the noise that a video is inverted to returns the video; null texts do so under guidance.

The network is exact: the posterior mean of a mixture of two Gaussians, as any objective's prediction.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, SamplerConfig, inversion, make_objective, sample
from dit_booth.diffusion.inversion import DDIMPath, ddim_move, invert, invert_along, sample_along
from dit_booth.diffusion.null_text import NullTextConfig, optimise_null_text
from dit_booth.diffusion.objectives import DiscreteObjective, FlowObjective, Objective
from dit_booth.diffusion.samplers import Model
from dit_booth.diffusion.schedule import DiscreteSchedule, scaled_linear_betas

torch.set_num_threads(1)
OBJECTIVES: dict[str, ObjectiveConfig] = {
    "eps": ObjectiveConfig(),
    "eps scaled": ObjectiveConfig(beta_schedule="scaled_linear"),
    "v": ObjectiveConfig(kind="v"),
    "flow": ObjectiveConfig(kind="flow"),
    "flow shifted": ObjectiveConfig(kind="flow", shift=3.0),
    "flow x0": ObjectiveConfig(kind="flow", prediction="x0"),
}
SPREAD = 0.5
"""Standard deviation of each of the two Gaussians, whose means are +1 and -1 in every element."""


def videos(dtype: torch.dtype = torch.float64) -> Tensor:
    """Samples of the mixture: (b f c h w)."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1, 1)
    return (signs + SPREAD * torch.randn(2, 3, 2, 4, 4, generator=generator)).to(dtype)


def levels(objective: Objective, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise of x_t = a x0 + s eps."""
    one, none = torch.ones_like(x), torch.zeros_like(x)
    return objective.noise(one, t, none), objective.noise(none, t, one)


def exact(objective: Objective) -> Model:
    """The prediction that the posterior mean of x0 implies."""

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        t = objective.from_timestep(timestep)
        a, s = levels(objective, t, x)
        variance = (a * SPREAD).square() + s.square()
        side = torch.tanh((2 * a * x / variance).flatten(1).sum(1) / 2).reshape(-1, 1, 1, 1, 1)
        x0 = side + a * SPREAD**2 / variance * (x - a * side)
        if isinstance(objective, FlowObjective) and objective.config.prediction == "x0":
            return x0
        return objective.target(x0, (x - a * x0) / s.clamp_min(1e-12), t)

    return model


def round_trip(objective_name: str, refine: int = 0, **sampler: Any) -> float:
    """The largest error of a video that was inverted and sampled."""
    objective, x0 = make_objective(OBJECTIVES[objective_name]), videos()
    config, model = SamplerConfig(**sampler), exact(objective)
    noise = invert(model, objective, config, x0, refine)
    return (sample(model, objective, config, noise) - x0).abs().max().item()


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "flow x0"])
def test_the_error_falls_as_one_over_the_steps(kind: str) -> None:
    errors = [round_trip(kind, steps=steps) for steps in (25, 50, 100, 200)]
    assert all(1.5 < before / after < 2.6 for before, after in pairwise(errors)), errors
    assert errors[-1] < 0.05, errors


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_refined_the_inverse_is_exact(kind: str) -> None:
    errors = [round_trip(kind, steps=20, refine=refine) for refine in (0, 2, 30)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4, errors


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_noise_is_that_of_the_video(kind: str) -> None:
    """The exact flow maps the mixture to a standard normal: of the same size everywhere, and not the video again."""
    objective, x0 = make_objective(OBJECTIVES[kind]), videos()
    noise = invert(exact(objective), objective, SamplerConfig(steps=100), x0, refine=3)
    assert 0.75 < noise.std() < 1.25
    assert noise.mean().abs() < 0.35 and (noise - x0).abs().mean() > 0.3


def test_errors_of_an_x0_prediction_do_not_add_up_to_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below t = 0.05 there is one step: of 200 steps, 190 and that one. With all of them, the noise grows."""
    objective, x0 = make_objective(OBJECTIVES["flow x0"]), videos()
    model, off, config = exact(objective), 0.1 * videos().flip(0), SamplerConfig(steps=200)
    clean, noises = invert(model, objective, config, x0), []
    for smallest, steps in ((inversion.SMALLEST_T, 191), (0.0, 200)):
        monkeypatch.setattr(inversion, "SMALLEST_T", smallest)
        calls = list[float]()

        def wrong(x: Tensor, t: Tensor, calls: list[float] = calls) -> Tensor:
            calls.append(t[0].item())
            return model(x, t) + off

        noises.append(invert(wrong, objective, config, x0))
        assert len(calls) == steps and min(calls) >= smallest * 999 - 1e-6
    merged, all_steps = ((noise - clean).std() for noise in noises)
    assert merged < 0.75 * all_steps, (merged, all_steps)


@pytest.mark.parametrize("spacing", ["ddim", "10,20,20"])
def test_every_spacing_of_the_sampler_is_inverted(spacing: str) -> None:
    assert round_trip("eps", refine=30, steps=50, spacing=spacing) < 1e-4


def test_heun_is_inverted_by_eulers_steps() -> None:
    errors = [round_trip("flow", steps=steps, kind="heun") for steps in (25, 50, 100)]
    assert all(1.5 < before / after < 2.6 for before, after in pairwise(errors)), errors


def test_the_network_sees_the_dtype_of_the_video() -> None:
    objective, seen = make_objective(OBJECTIVES["eps"]), set()
    model = exact(objective)

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return model(x, t)

    noise = invert(watched, objective, SamplerConfig(steps=4), videos(torch.bfloat16))
    assert seen == {torch.bfloat16} and noise.dtype == torch.bfloat16


def test_what_draws_noise_has_no_inverse() -> None:
    eps, flow = (make_objective(OBJECTIVES[kind]) for kind in ("eps", "flow"))
    for objective, config in (
        (eps, SamplerConfig(kind="ddpm")),
        (eps, SamplerConfig(kind="ddim", eta=0.5)),
        (flow, SamplerConfig(kind="euler", eta=1.0)),
    ):
        with pytest.raises(ValueError, match="has no inverse; use kind=ddim or euler with eta=0"):
            invert(exact(objective), objective, config, videos())
    with pytest.raises(ValueError, match="kind=euler does not fit EpsObjective"):
        invert(exact(eps), eps, SamplerConfig(kind="euler"), videos())
    with pytest.raises(ValueError, match="refine=-1"):
        invert(exact(eps), eps, SamplerConfig(), videos(), refine=-1)


# ---- along a path ------------------------------------------------------------------------------------------


def test_a_move_and_its_reverse_cancel() -> None:
    x, eps = videos(), videos().flip(0)
    torch.testing.assert_close(ddim_move(ddim_move(x, eps, 0.9, 0.2), eps, 0.2, 0.9), x)


def test_the_path_of_a_schedule_is_the_samplers() -> None:
    objective = make_objective(OBJECTIVES["eps"])
    assert isinstance(objective, DiscreteObjective)
    path, model, noise = DDIMPath.of(objective.schedule.respace("20")), exact(objective), videos()
    back = sample_along(path, lambda x, t: model(x, objective.timestep(t)), noise)
    assert len(back) == 21
    expected = sample(model, objective, SamplerConfig(steps=20), noise)
    torch.testing.assert_close(back[-1], expected, rtol=1e-9, atol=1e-9)
    inverted = invert_along(path, lambda x, t: model(x, objective.timestep(t)), videos())
    torch.testing.assert_close(inverted[-1], invert(model, objective, SamplerConfig(steps=20), videos()))


# ---- null texts --------------------------------------------------------------------------------------------


def linear(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return 0.3 * x + 0.2 * (text.mean(1) @ WORDS)[:, None, :, None, None]


WORDS = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def test_null_texts_bring_guided_sampling_back_to_the_inverted_video() -> None:
    path = DDIMPath.of(DiscreteSchedule(scaled_linear_betas()).respace("10"))
    generator = torch.Generator().manual_seed(2)
    text, null = (torch.randn(2, 4, 6, generator=generator).double() for _ in range(2))
    with torch.no_grad():
        inverted = invert_along(path, lambda x, t: linear(x, t, text), videos())
    config = NullTextConfig(lr=0.1, inner_steps=100, epsilon=1e-7)
    found = optimise_null_text(path, linear, inverted, text, null, config)
    plain = optimise_null_text(path, linear, inverted, text, null, replace(config, lr=0.0, inner_steps=1))
    error, before = ((run.states[-1] - videos()).abs().max() for run in (found, plain))
    assert error < 0.1 * before, (error, before)
    assert [len(found.embeddings), len(found.states), len(found.updates)] == [10, 11, 10]
    assert plain.updates == [1] * 10 and found.updates == [100] * 10
    loose = optimise_null_text(path, linear, inverted, text, null, replace(config, epsilon=1e-2))
    assert min(loose.updates) < 100, "it stops where it is close"
    assert WORDS.grad is None and not found.embeddings[0].requires_grad
    with pytest.raises(ValueError, match="inverted has 10 states; a path of 10 steps needs 11"):
        optimise_null_text(path, linear, inverted[1:], text, null)
