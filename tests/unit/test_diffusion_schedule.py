"""Schedules: respacing, identities of the tables, messages."""

from __future__ import annotations

import pytest
import torch

from dit_booth.diffusion import DiscreteSchedule, linear_betas, scaled_linear_betas, spaced_steps


@pytest.mark.parametrize(
    "sections", ["1", "2", "5", "50", "250", "1000", "10,15,20", "ddim50", "ddim250", [3, 4]]
)
def test_respacing_keeps_the_noise_levels_of_the_visited_steps(sections: str | list[int]) -> None:
    full = DiscreteSchedule(linear_betas())
    spaced = full.respace(sections)
    visited = full.alphas_cumprod[spaced.timestep_map]
    torch.testing.assert_close(spaced.alphas_cumprod, visited, rtol=1e-12, atol=0)
    assert (spaced.timestep_map.diff() > 0).all()


def test_respacing_composes() -> None:
    half = DiscreteSchedule(linear_betas()).respace("ddim500").respace("ddim250")
    assert torch.equal(half.timestep_map, torch.arange(0, 1000, 4))


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ("4", [0, 3, 6, 9]),
        ("10", list(range(10))),
        ("ddim5", [0, 2, 4, 6, 8]),
        ("1,3", [0, 5, 7, 9]),
        ("1", [0]),
    ],
)
def test_spaced_steps(sections: str, expected: list[int]) -> None:
    assert spaced_steps(10, sections) == expected


@pytest.mark.parametrize("sections", ["11", "0", "ddim7", "6,1", "five", "ddimfive", "", "-1"])
def test_spacing_that_cannot_be_is_an_error_that_shows_it(sections: str) -> None:
    with pytest.raises(ValueError, match="spacing="):
        spaced_steps(10, sections)


def test_tables_agree_with_bayes_rule() -> None:
    """The posterior of x_{t-1}: the product of the Gaussians q(x_{t-1} | x0) and q(x_t | x_{t-1})."""
    schedule = DiscreteSchedule(scaled_linear_betas())
    before, beta = schedule.alphas_cumprod_prev[1:], schedule.betas[1:]
    precision = 1 / (1 - before) + (1 - beta) / beta
    torch.testing.assert_close(schedule.posterior_variance[1:], 1 / precision, rtol=1e-10, atol=0)
    coef1, coef2 = before.sqrt() / (1 - before) / precision, (1 - beta).sqrt() / beta / precision
    torch.testing.assert_close(schedule.posterior_mean_coef1[1:], coef1, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.posterior_mean_coef2[1:], coef2, rtol=1e-10, atol=0)


def test_scaled_linear_is_stable_diffusions() -> None:
    betas = scaled_linear_betas()
    assert betas[0].item() == pytest.approx(0.00085)
    assert betas[-1].item() == pytest.approx(0.012)
    assert DiscreteSchedule(betas).alphas_cumprod[-1].item() == pytest.approx(0.0047, abs=1e-4)


@pytest.mark.parametrize("arguments", [(0, 1e-4, 0.02), (10, 0.0, 0.02), (10, 0.02, 1e-4), (10, 0.1, 1.0)])
def test_impossible_betas_are_refused(arguments: tuple[int, float, float]) -> None:
    for betas in (linear_betas, scaled_linear_betas):
        with pytest.raises(ValueError, match=r"n=0|beta_start="):
            betas(*arguments)


def test_schedule_refuses_malformed_tables() -> None:
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(torch.tensor([0.1, 1.5]))
    with pytest.raises(ValueError, match="timestep_map has 3 entries, betas 2"):
        DiscreteSchedule(torch.tensor([0.1, 0.2]), torch.arange(3))
