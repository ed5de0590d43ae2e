"""The motion of latents (Text2Video-Zero): what a warp moves, what noise is added, what stays of the background."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import Objective, ObjectiveConfig, make_objective
from dit_booth.diffusion.motion_warp import motion_field, renoise, smooth_background, warp

torch.set_num_threads(1)


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_no_motion_is_no_change() -> None:
    x = latents(2, 3, 4, 16, 12)
    assert torch.equal(warp(x, motion_field([0, 0, 0])), x)


@pytest.mark.parametrize("antialias", [False, True])
def test_frame_k_shows_what_lies_k_times_the_strength_further(antialias: bool) -> None:
    """16 latents for 64 pixels: a motion by (8, -4) pixels is (2, -1) latents."""
    x = latents(1, 1, 2, 16, 16).expand(-1, 4, -1, -1, -1)
    moved = warp(x, motion_field(range(4), (8.0, -4.0), size=64), antialias)
    for k in range(4):
        inside = moved[:, k, :, 4:12, : 16 - 2 * k - 2]
        assert torch.equal(inside, x[:, k, :, 4 - k : 12 - k, 2 * k : 14])


def test_the_border_is_reflected() -> None:
    x = torch.arange(8.0).reshape(1, 1, 1, 1, 8).expand(1, 1, 1, 8, 8)
    moved = warp(x, motion_field([1], (24.0, 0.0), size=64))
    assert moved[0, 0, 0, 4].tolist() == [3, 4, 5, 6, 7, 7, 6, 5]


def test_a_video_moves_by_its_own_field_in_its_own_dtype() -> None:
    x = latents(2, 2, 3, 8, 8).to(torch.bfloat16)
    field = motion_field([1, 2])
    moved = warp(x, field)
    assert moved.dtype == torch.bfloat16 and torch.equal(moved[1:], warp(x[1:], field))
    with pytest.raises(ValueError, match="field has 2 frames, x has 1: give one motion per frame"):
        warp(x[:, :1], field)


@pytest.mark.parametrize(("kind", "t0", "t1"), [("eps", 120, 640), ("v", 0, 999), ("flow", 0.2, 0.7)])
def test_noise_of_two_steps_has_the_level_of_one(kind: str, t0: float, t1: float) -> None:
    """Signal and variance of x_t1 are those of noising x0 at once: read off with one input at a time."""
    objective = make_objective(ObjectiveConfig(kind=kind))  # type: ignore[arg-type]
    unit, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    start, end = (torch.tensor([t]) for t in (t0, t1))
    signal, first, second = (
        renoise(objective, objective.noise(x0, start, e0), start, end, e1)
        for x0, e0, e1 in ((unit, none, none), (none, unit, none), (none, none, unit))
    )
    assert torch.allclose(signal, objective.noise(unit, end, none))
    variance = objective.noise(none, end, unit).square()
    assert torch.allclose(first.square() + second.square(), variance)
    assert first > 0 and second > 0


def test_noise_is_never_taken_away() -> None:
    objective: Objective = make_objective(ObjectiveConfig())
    x, t = latents(2, 1, 4, 3, 3), torch.tensor([300, 900])
    assert torch.equal(renoise(objective, x, t, t, latents(*x.shape, seed=1)), x)
    with pytest.raises(ValueError, match=r"t1=.300, 899. is below t0=.300, 900.*give t1 >= t0"):
        renoise(objective, x, t, torch.tensor([300, 899]), x)


def test_pure_noise_stays_as_it_is() -> None:
    x, t = latents(1, 1, 4, 3, 3), torch.tensor([1.0])
    flow = make_objective(ObjectiveConfig(kind="flow"))
    assert torch.equal(renoise(flow, x, t, t, latents(*x.shape, seed=1)), x)


def test_the_foreground_stays_and_the_background_is_a_convex_combination() -> None:
    x, warped = latents(2, 3, 4, 5, 6), latents(2, 3, 4, 5, 6, seed=1)
    mask = (latents(2, 3, 1, 5, 6, seed=2) > 0).float()
    inside = mask.bool().expand_as(x)
    smooth = smooth_background(x, warped, mask)
    assert torch.equal(smooth[inside], x[inside])
    torch.testing.assert_close(smooth[~inside], 0.6 * warped[~inside] + 0.4 * x[~inside])
    assert torch.equal(smooth_background(x, warped, mask, 0.0), x)
    assert torch.equal(smooth_background(x, warped, mask, 1.0)[~inside], warped[~inside])
    half = smooth_background(x, warped, torch.full_like(mask, 0.5), 1.0)
    torch.testing.assert_close(half, (x + warped) / 2)


def test_masks_and_weights_that_do_not_fit_are_refused() -> None:
    x, mask = latents(2, 3, 4, 5, 6), torch.ones(2, 3, 1, 5, 6)
    with pytest.raises(ValueError, match=r"weight=1.5.*in .0, 1"):
        smooth_background(x, x, mask, 1.5)
    with pytest.raises(ValueError, match=r"one mask .b f 1 h w"):
        smooth_background(x, x, mask[:, :, 0])
