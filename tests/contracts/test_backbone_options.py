"""Every strategy on every conditioning and kind of positions of the DiT, on images, and on a U-Net with positions.

Layouts by themselves are among the tiny backbones, on which test_strategies.py checks all promises.
"""

from __future__ import annotations

from dataclasses import replace
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
    "image": DiTConfig(**SHAPE, layout="image", plan="self"),
    "adaln": DiTConfig(**SHAPE, conditioning="adaln"),
    "in_context": DiTConfig(**SHAPE, conditioning="in_context"),
    "cross_attention": DiTConfig(**SHAPE, conditioning="cross_attention", positions="rotary"),
    "rotary": DiTConfig(**SHAPE, positions="rotary", qk_norm=True, mlp="swiglu", conv=True),
    "rotary joint": DiTConfig(**SHAPE, layout="joint", plan="all", positions="rotary"),
    "frames alone in time": DiTConfig(**SHAPE, positions="rotary", plan="first", temporal_plan="self"),
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


def test_with_frames_alone_in_time_and_in_space_a_video_is_its_images() -> None:
    """Rotary positions are relative, so a frame at place 2 is the same image as at place 0."""
    config = DiTConfig(**SHAPE, positions="rotary", plan="self", temporal_plan="self")
    run = trial("none", "dit-factorised", dit=config)
    with torch.no_grad():
        for parameter in run.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        whole = run.plain()
        frame = replace(run, x=run.x[:, 2:3]).plain()
    assert worst(whole[:, 2:3], frame) <= 1e-5 * whole.abs().max().item()


def test_the_unet_reads_no_other_frame_in_time_if_each_is_alone() -> None:
    """Its group norms still span the frames, as VideoBooth's do."""
    own = {
        "channels": (12, 24),
        "norm_groups": 4,
        "heads": 2,
        "layers_per_block": 1,
        "down_attention": (True, True),
    }
    config = UNetConfig(**own, plan="self", temporal_plan="self")  # type: ignore[arg-type]
    run = trial("none", "unet", unet=config)
    seen: list[torch.Tensor] = []
    for name, module in run.model.backbone.named_modules():
        if name.endswith("attn_temp"):
            module.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[:3]))
    run.plain()
    assert seen and all(
        shape[1:] == (run.x.shape[1], 1) for shape in seen
    )  # a group of one token for each frame


def test_layouts_without_temporal_attention_refuse_a_plan_for_it() -> None:
    with pytest.raises(ValueError, match=r"dit.temporal_plan is 'self', but dit.layout 'joint'"):
        DiTConfig(layout="joint", plan="all", temporal_plan="self")
    with pytest.raises(ValueError, match="unknown term"):
        UNetConfig(temporal_plan="none")
