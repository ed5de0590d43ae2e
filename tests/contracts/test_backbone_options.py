"""Every strategy on every layout, conditioning and kind of positions of the DiT, and on a U-Net with positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.unet.model import UNetConfig
from dit_booth.strategy import registered
from dit_booth.testing import trial, worst

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {"depth": 2, "hidden": 48, "heads": 4}
CONFIGS: dict[str, DiTConfig | UNetConfig] = {
    "interleaved": DiTConfig(**SHAPE, layout="interleaved"),
    "joint": DiTConfig(**SHAPE, layout="joint", plan="all"),
    "image": DiTConfig(**SHAPE, layout="image", plan="self"),
    "adaln": DiTConfig(**SHAPE, conditioning="adaln"),
    "in_context": DiTConfig(**SHAPE, conditioning="in_context"),
    "cross_attention": DiTConfig(**SHAPE, conditioning="cross_attention", positions="rotary"),
    "rotary": DiTConfig(**SHAPE, positions="rotary", qk_norm=True, mlp="swiglu", conv=True),
    "rotary joint": DiTConfig(**SHAPE, layout="joint", plan="all", positions="rotary"),
    "unet rotary": UNetConfig(
        channels=(12, 24),
        norm_groups=4,
        heads=2,
        layers_per_block=1,
        down_attention=(True, True),
        positions="rotary",
    ),
}
STRATEGIES = sorted(registered())
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@EVERY
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_new_strategy_changes_nothing_without_an_image_and_trains_with_one(
    name: str, config: DiTConfig | UNetConfig
) -> None:
    unet = isinstance(config, UNetConfig)
    run = trial(name, "unet" if unet else "dit-factorised", **{"unet" if unet else "dit": config})
    with torch.no_grad():
        plain = run.plain()
        assert plain.abs().max() > 1e-3
        # Keys that a tap projects anew get the attention's own norm and rotation: equal up to rounding at the most.
        assert worst(run(None), plain) <= 1e-6 * plain.abs().max().item()
    out = run(run.reference())
    assert out.shape == plain.shape and out.isfinite().all()
    if registered()[name].identity_at_init:
        assert worst(out.detach(), plain) <= 1e-6 * plain.abs().max().item()
    else:
        assert worst(out.detach(), plain) > 1e-6
    own = dict(run.model.strategy.named_parameters())
    if own:
        out.square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in own.values())
        assert any(p.grad is not None for p in own.values())
