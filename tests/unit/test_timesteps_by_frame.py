"""A timestep for every frame: both backbones, every strategy, every objective (Diffusion Forcing)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import repeat
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, make_objective, randn
from dit_booth.models.dit.model import DiTConfig
from dit_booth.strategy import registered
from dit_booth.testing import BACKBONES, Trial, trial, worst

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {"depth": 2, "hidden": 48, "heads": 4}
OPTIONS = {
    "in_context": DiTConfig(**SHAPE, conditioning="in_context"),
    "adaln": DiTConfig(**SHAPE, conditioning="adaln", head_text=False),
}


def by_frame(run: Trial) -> Trial:
    """Return the same trial with the videos' timesteps repeated for each frame."""
    return replace(run, t=repeat(run.t, "b -> b f", f=run.x.shape[1]))


def check_equal(run: Trial) -> None:
    with torch.no_grad():
        whole, each = run(run.reference()), by_frame(run)(run.reference())
    assert whole.abs().max() > 1e-3 and worst(whole, each) <= 1e-6 * max(1, whole.abs().max().item())


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
@pytest.mark.parametrize("name", registered())
def test_equal_timesteps_are_that_of_the_video_for_every_strategy(name: str, backbone: str) -> None:
    check_equal(trial(name, backbone).perturb())


@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - {"dit-factorised", "unet"}))
def test_equal_timesteps_are_that_of_the_video_on_every_layout(backbone: str) -> None:
    check_equal(trial("kv_concat+adaln", backbone).perturb())


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_timesteps_are_that_of_the_video_with_every_conditioning(name: str) -> None:
    check_equal(trial("none", dit=OPTIONS[name]))


@torch.no_grad()
def test_a_frame_is_modulated_by_its_own_timestep() -> None:
    """The frames of an image model stand alone: each is as in a video of its timestep."""
    run = trial("adaln", dit=DiTConfig(**SHAPE, layout="image", plan="self")).perturb()
    times = torch.tensor([[0.0, 400.0, 900.0], [500.0, 20.0, 300.0]])
    mixed = replace(run, t=times)(run.reference())
    for frame in range(3):
        alone = replace(run, t=times[:, frame])(run.reference())
        assert worst(mixed[:, frame], alone[:, frame]) <= 1e-6 * alone.abs().max().item()
        assert worst(mixed[:, frame], replace(run, t=times[:, frame - 1])(run.reference())[:, frame]) > 1e-4


@torch.no_grad()
def test_the_unet_adds_each_frames_timestep_to_that_frame() -> None:
    run = trial("none", "unet")
    block = run.model.backbone.down_blocks[0].resnets[0]  # type: ignore[union-attr, index]
    seen: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda _, given: seen.append(given[0]))  # type: ignore[union-attr]
    times = torch.tensor([[0.0, 400.0, 900.0], [500.0, 20.0, 300.0]])
    for t in (times, *times.unbind(1)):
        replace(run, t=t).plain()
    mixed, *alone = seen
    for frame in range(3):
        assert worst(mixed[:, frame], alone[frame][:, frame]) <= 1e-6
        assert worst(mixed[:, frame], alone[frame - 1][:, frame]) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_the_reference_has_the_timestep_of_frame_0(backbone: str) -> None:
    """The noised one of `kv_concat`, and the frame before the video of `in_context`."""
    run = trial("kv_concat", backbone)
    seen: list[Tensor] = []
    run.model.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    times = torch.tensor([[30.0, 400.0, 900.0], [500.0, 20.0, 300.0]])
    replace(run, t=times)(run.reference())
    recording, video = seen
    assert torch.equal(recording, times[:, 0]) and torch.equal(video, times)
    run = trial("in_context", backbone)
    whole, first = (replace(run, t=t)(run.reference()) for t in (times, times[:, :1].expand(-1, 3)))
    assert worst(whole, first) > 1e-4


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_other_shapes_are_refused(backbone: str) -> None:
    run = trial("none", backbone)
    for t in (torch.zeros(2, 2), torch.zeros(2, 3, 1)):
        with pytest.raises(ValueError, match=r"one timestep per video \(b,\), or one per frame .* f = 3"):
            replace(run, t=t).plain()


# ---- objectives --------------------------------------------------------------------------------------------

CONFIGS = {
    "eps": ObjectiveConfig(),
    "v, weighted": ObjectiveConfig(kind="v", min_snr=5.0),
    "flow": ObjectiveConfig(kind="flow"),
    "flow of x0": ObjectiveConfig(kind="flow", prediction="x0"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_frame_is_noised_converted_and_weighted_at_its_own_t(name: str) -> None:
    objective, draw = make_objective(CONFIGS[name]), torch.Generator().manual_seed(0)
    x0, eps, pred = (randn((2, 3, 4, 2, 2), draw).double() for _ in range(3))
    t = objective.t_at(torch.tensor([[0.1, 0.5, 0.9], [0.3, 0.7, 0.2]]))
    x_t = objective.noise(x0, t, eps)
    loss = objective.loss(pred, x0, eps, t)
    of_frames = torch.zeros(2, 3, dtype=torch.float64)
    for frame in range(3):
        at, own = t[:, frame], slice(frame, frame + 1)
        assert torch.equal(x_t[:, own], objective.noise(x0[:, own], at, eps[:, own]))
        assert torch.equal(
            objective.target(x0, eps, t)[:, own], objective.target(x0[:, own], eps[:, own], at)
        )
        for convert in (objective.to_x0, objective.to_eps):
            assert torch.equal(convert(pred, x_t, t)[:, own], convert(pred[:, own], x_t[:, own], at))
        of_frames[:, frame] = objective.loss(pred[:, own], x0[:, own], eps[:, own], at)
    torch.testing.assert_close(loss, of_frames.mean(1))
    same = objective.loss(pred, x0, eps, t[:, :1].expand(-1, 3))
    torch.testing.assert_close(same, objective.loss(pred, x0, eps, t[:, 0]), rtol=1e-6, atol=0)
