"""Motion of latents without training (Text2Video-Zero, arXiv 2303.13439, section 3.3): warp, re-noise, smooth.

The latents of frame 0 at t0 are copied to every frame, moved along a motion field, and noised forward to t1::

    moved = warp(first.expand(-1, frames, ...), motion_field(range(frames)))
    x = renoise(objective, moved, t0, t1, randn_like(moved, generator))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.diffusion.noise import compute_dtype, expand_like
from dit_booth.diffusion.objectives import DiscreteObjective, FlowObjective, Objective

FIELD_SIZE = 512
"""Side of the image whose pixels are the unit of a motion, and of the grid on which the field is given."""


def motion_field(
    frame_ids: Sequence[int] | Tensor,
    strength: tuple[float, float] = (12.0, 12.0),
    size: int = FIELD_SIZE,
) -> Tensor:
    """Return the global translation of each frame, (f 2 size size): `strength` (x, y) times the frame's index.

    In pixels of an image of `size`: the position in frame 0 that each pixel of frame k shows (section 3.3, eq. 8).
    """
    ids = torch.as_tensor(frame_ids, dtype=torch.float32)
    shift = rearrange(ids, "f -> f 1") * torch.tensor(strength)
    return repeat(shift, "f c -> f c h w", h=size, w=size)


def warp(x: Tensor, field: Tensor, antialias: bool = False) -> Tensor:
    """Move latents (b f c h w) along a field (f 2 H W) in its own pixels: nearest values, reflected at the border.

    The positions are resized bilinearly to the latents' size; `antialias` smooths them first (released: not).
    Raises ValueError if the field has another number of frames.
    """
    if field.shape[0] != x.shape[1]:
        raise ValueError(f"field has {field.shape[0]} frames, x has {x.shape[1]}: give one motion per frame")
    height, width = field.shape[-2:]
    columns, rows = (torch.arange(n, dtype=field.dtype, device=field.device) for n in (width, height))
    at = torch.stack([columns.expand(height, width), rearrange(rows, "h -> h 1").expand(height, width)])
    extent = torch.tensor([width, height], dtype=field.dtype, device=field.device)
    relative = (at + field) / rearrange(extent, "c -> c 1 1") * 2 - 1  # f 2 H W in [-1, 1] inside
    resized = F.interpolate(relative, x.shape[-2:], mode="bilinear", align_corners=False, antialias=antialias)
    grid = repeat(resized, "f c h w -> (b f) h w c", b=len(x)).to(x.device)
    frames = rearrange(x.to(grid.dtype), "b f c h w -> (b f) c h w")
    moved = F.grid_sample(frames, grid, mode="nearest", padding_mode="reflection", align_corners=False)
    return rearrange(moved, "(b f) c h w -> b f c h w", b=len(x)).to(x.dtype)


def renoise(objective: Objective, x: Tensor, t0: Tensor, t1: Tensor, eps: Tensor) -> Tensor:
    """Noise x (b ...) further, from t0 to t1 >= t0 (b,), in the objective's units (DDPM forward process).

    x_t1 = (a1 / a0) x + sqrt(s1^2 - (a1 / a0)^2 s0^2) eps, with signal a and noise s. Raises ValueError where t1 < t0.
    """
    if bool((t1 < t0).any()):
        raise ValueError(
            f"t1={t1.tolist()} is below t0={t0.tolist()}: noise can only be added; give t1 >= t0"
        )
    dtype = compute_dtype(x, eps)
    (a0, s0), (a1, s1) = (_levels(objective, t, x, dtype) for t in (t0, t1))
    kept = torch.where(a0 > 0, a1 / a0, 1.0)  # pure noise stays pure noise
    noise = (s1.square() - (kept * s0).square()).clamp_min(0).sqrt()
    return (kept * x + noise * eps).to(x.dtype)


def _levels(objective: Objective, t: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return signal and noise level at t, broadcastable against x."""
    if isinstance(objective, DiscreteObjective):
        table = objective.schedule.at
        return table("alpha", t, x, dtype), table("sigma", t, x, dtype)
    assert isinstance(objective, FlowObjective)
    s = expand_like(t.to(dtype), x)
    return 1 - s, s


def smooth_background(x: Tensor, warped: Tensor, foreground: Tensor, weight: float = 0.6) -> Tensor:
    """M x + (1 - M) (weight * warped + (1 - weight) x): keep the background of frame 0 (section 3.3, eq. 10).

    x, warped: (b f c h w), the current latents and frame 0's at the same t, moved along the field; foreground: M
    (b f 1 h w) in [0, 1], of the resolution of x. Raises ValueError for other shapes or a weight outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}: the background is a convex combination; choose it in [0, 1]")
    if warped.shape != x.shape or foreground.shape != (*x.shape[:2], 1, *x.shape[3:]):
        raise ValueError(
            f"x is {tuple(x.shape)}, warped {tuple(warped.shape)} and foreground {tuple(foreground.shape)}: "
            "give two of (b f c h w) and one mask (b f 1 h w)"
        )
    mask = foreground.to(x.dtype)
    return mask * x + (1 - mask) * torch.lerp(x, warped, weight)
