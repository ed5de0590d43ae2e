"""Options of training: weight decay by glob, the fused optimizer, EDM2's average, min-SNR weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dit_booth.config import TrainConfig
from dit_booth.diffusion import ObjectiveConfig, make_objective
from dit_booth.training.ema import Ema, power_of
from dit_booth.training.optimizer import decay_groups, make_optimizer

torch.set_num_threads(1)


# ---- the optimizer -----------------------------------------------------------------------------------------


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    names = (
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn1.to_q.bias",
        "blocks.0.norm_q.weight",
        "head.weight",
    )
    return {name: nn.Parameter(torch.randn(3)) for name in names}


def decays(**train: Any) -> dict[str, float]:
    """Parameter name -> the weight decay of the group that it is in."""
    named = parameters()
    groups = decay_groups(named, TrainConfig(**train))
    found = [
        (name, g["weight_decay"]) for name, p in named.items() for g in groups for q in g["params"] if p is q
    ]
    assert len(found) == len(named), "every parameter is in one group"
    assert len({g["weight_decay"] for g in groups}) == len(groups)
    return dict(found)


def test_without_globs_there_is_one_group() -> None:
    assert set(decays(weight_decay=0.1).values()) == {0.1}


def test_the_last_glob_that_matches_counts() -> None:
    got = decays(weight_decay=0.1, decay_of=("blocks.*=0.02", "*.bias=0", "*.norm_?.*=0"))
    assert list(got.values()) == [0.02, 0.0, 0.0, 0.1]


def test_a_dead_glob_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"decay_of has '\*\.biass', which matches none of the 4.*nearest"):
        decays(decay_of=("*.biass=0",))


@pytest.mark.parametrize("rule", ["*.bias", "=0", "*.bias=x", "*.bias=-1", "*.bias=1e999"])
def test_a_rule_is_a_glob_and_a_number(rule: str) -> None:
    with pytest.raises(ValueError, match=r"write GLOB=DECAY, such as \*\.bias=0"):
        TrainConfig(decay_of=(rule,))


def test_decay_shrinks_what_it_should() -> None:
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = make_optimizer(named, TrainConfig(weight_decay=0.5, decay_of=("*.bias=0",)), lr=0.1)
    for p in named.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in named.items():
        factor = 1.0 if name.endswith("bias") else 1 - 0.1 * 0.5
        assert torch.allclose(p, before[name] * factor)


def test_the_fused_kernel_is_used_and_agrees() -> None:
    results = []
    for fused in (None, False):
        named = parameters()
        optimizer = make_optimizer(named, TrainConfig(weight_decay=0.1), lr=0.01)
        assert optimizer.defaults["fused"]
        if fused is False:
            optimizer = torch.optim.AdamW(
                list(named.values()), lr=0.01, betas=(0.9, 0.999), weight_decay=0.1, fused=False
            )
        for step in range(5):
            for i, p in enumerate(named.values()):
                p.grad = torch.sin(torch.arange(3.0) + step + i)
            optimizer.step()
        results.append(torch.cat([p.detach() for p in named.values()]))
    assert torch.allclose(*results, atol=1e-7)


# ---- the average -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "power"), [(0.05, 16.97), (0.1, 6.94)])
def test_the_exponents_are_edm2s(width: float, power: float) -> None:
    """The pairs that the paper names in section 3.2."""
    assert power_of(width) == pytest.approx(power, abs=0.01)


def test_the_power_function_average_is_the_weighted_mean_of_all_steps() -> None:
    """In discrete steps, step s has the weight beta(t) ... beta(s + 1) (1 - beta(s)), about s ** gamma."""
    width, steps = 0.1, 400
    parameter = nn.Parameter(torch.tensor([7.0], dtype=torch.float64))
    ema = Ema({"p": parameter}, decay=0.0, width=width)
    for step in range(1, steps + 1):
        parameter.data.fill_(step / steps)
        ema.update(step)
    mean = float(ema.shadow["p"])
    gamma = power_of(width)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=5e-3), "the mean of tau ** gamma over [0, 1]"
    weights = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    spread = (weights**gamma * (weights - mean) ** 2).sum() / (weights**gamma).sum()
    assert math.sqrt(spread) == pytest.approx(width, rel=2e-2), "the width is the standard deviation"


def test_the_start_has_no_weight() -> None:
    parameter = nn.Parameter(torch.tensor([5.0]))
    ema = Ema({"p": parameter}, decay=0.9, width=0.05)
    parameter.data.fill_(1.0)
    ema.update(1)
    assert ema.shadow["p"].item() == 1.0


@pytest.mark.parametrize("width", [-0.1, 0.3])
def test_impossible_widths_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match=r"train\.ema_width is"):
        TrainConfig(ema_width=width)


# ---- min-SNR -----------------------------------------------------------------------------------------------


def test_eps_and_v_weigh_the_error_of_x0_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps, error = (torch.randn(6, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    t = torch.tensor([0, 50, 200, 500, 800, 999])
    for kind in ("eps", "v"):
        objective = make_objective(ObjectiveConfig(kind=kind, min_snr=5.0))  # type: ignore[arg-type]
        plain = make_objective(ObjectiveConfig(kind=kind))  # type: ignore[arg-type]
        prediction = objective.target(x0, eps, t) + 0.1 * error
        x_t = objective.noise(x0, t, eps)
        of_x0 = (objective.to_x0(prediction, x_t, t) - x0).square().flatten(1).mean(1)
        alpha, sigma = objective.schedule.alpha[t], objective.schedule.sigma[t]  # type: ignore[attr-defined]
        snr = (alpha / sigma) ** 2
        assert torch.allclose(objective.loss(prediction, x0, eps, t), snr.clamp_max(5.0) * of_x0, rtol=1e-8)
        assert torch.allclose(plain.loss(prediction, x0, eps, t), (0.1 * error).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_snr": -1.0}, "objective.min_snr is -1.0"),
        ({"kind": "flow", "min_snr": 5.0}, "not to kind=flow; use 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ObjectiveConfig(**options)
