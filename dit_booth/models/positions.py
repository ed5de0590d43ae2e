"""Positions of tokens: sin-cos embeddings of grid and frame positions, and rotary angles.

All are functions of the shape, so any size and length works. Beyond the training size both extrapolate: positions
continue at the training spacing, nothing is interpolated (see docs/dit.md).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from dit_booth.attention import FrameIndices, Riflex
from dit_booth.inject import Place


def sincos(position: Tensor, dim: int) -> Tensor:
    """1-D sin-cos embedding of positions (n,): (n dim), sines first (ViT, MAE)."""
    half = dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=position.device, dtype=torch.float64) / half)
    angle = rearrange(position.double(), "n -> n 1") * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def image_position(frames: FrameIndices, context: int) -> int:
    """Return the position of a reference's keys: that of the first context frame, else of frame 0 of the video."""
    return frames[0] if context else 0


def sincos_2d(height: int, width: int, dim: int, device: torch.device) -> Tensor:
    """2-D sin-cos embedding of a grid: (height * width, dim); the column fills the first half (DiT, MAE)."""
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos embedding needs a width divisible by 4, not {dim}")
    rows, columns = (torch.arange(n, device=device) for n in (height, width))
    row = rearrange(sincos(rows, dim // 2).expand(width, -1, -1), "w h d -> (h w) d")
    column = rearrange(sincos(columns, dim // 2).expand(height, -1, -1), "h w d -> (h w) d")
    return torch.cat([column, row], dim=-1).float()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached table must serve training, too
def grid_embedding(
    height: int, width: int, dim: int, device: torch.device, frame_positions: FrameIndices | None
) -> Tensor:
    """Sin-cos embedding of every token's place and frame: (f n d), float32. Without frame positions: (1 n d)."""
    place = rearrange(sincos_2d(height, width, dim, device), "n d -> 1 n d")
    return place if frame_positions is None else place + frame_embedding(frame_positions, dim, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def frame_embedding(frame_positions: FrameIndices, dim: int, device: torch.device) -> Tensor:
    """Sin-cos embedding of the frames: (f 1 d), float32."""
    position = torch.tensor(tuple(frame_positions), device=device)
    return rearrange(sincos(position, dim).float(), "f d -> f 1 d")


class Rotary(NamedTuple):
    """Rotary angles (RoFormer, arXiv 2104.09864, eq. 34) of f groups of n tokens, shared by all heads."""

    cos: Tensor  # f n 1 d
    sin: Tensor  # f n 1 d, times -1 for the first of each pair
    interleaved: bool = False  # pairs are neighbours (RoFormer, Wan), not elements of the two halves

    @classmethod
    def of(cls, angle: Tensor, dtype: torch.dtype, *, interleaved: bool = False) -> Rotary:
        """Build the tables of the pairs' angles (f n 1 d/2), in float32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        first, second = (
            torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
            for pair in ((cos, cos), (-sin, sin))
        )
        return cls(first, second, interleaved)

    def apply(self, x: Tensor) -> Tensor:
        """Rotate x (b g m k d): group i as frame i, token j as place j of the grid.

        Groups with another number of tokens than the grid (a token bank) stay as they are.
        """
        groups = x.shape[1]
        if x.shape[2] != self.cos.shape[1] or groups > self.cos.shape[0]:
            return x
        wide = x.to(self.cos.dtype)
        if self.interleaved:
            partners = rearrange(wide, "... (d p) -> ... d p", p=2).flip(-1).flatten(-2)
        else:
            partners = wide.roll(x.shape[-1] // 2, dims=-1)
        return (wide * self.cos[:groups]).addcmul(partners, self.sin[:groups]).to(x.dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_3d(
    frame_positions: FrameIndices,
    height: int,
    width: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    riflex: Riflex | None = None,
    origin: tuple[int, int] = (0, 0),
    *,
    interleaved: bool = False,
) -> Rotary:
    """Angles of frame, row and column for heads of width `dim`: a third of the pairs each, the rest to the frame.

    riflex: of the frame's frequencies. origin: row and column of the first token. interleaved: see `Rotary`.

    ValueError: an odd width, or one with no pair for each of the three axes.
    """
    if dim % 2 or dim < 6:
        raise ValueError(
            f"rotary positions need heads of an even width of 6 or more, not {dim}; change the number of heads"
        )
    each = dim // 6
    frame = _angles(frame_positions, dim // 2 - 2 * each, device, riflex)
    row, column = (
        _angles(range(first, first + n), each, device)
        for first, n in zip(origin, (height, width), strict=True)
    )
    shape = (len(frame_positions), height, width)
    parts = (
        rearrange(frame, "f p -> f 1 1 p").expand(*shape, -1),
        rearrange(row, "h p -> 1 h 1 p").expand(*shape, -1),
        rearrange(column, "w p -> 1 1 w p").expand(*shape, -1),
    )
    return Rotary.of(
        rearrange(torch.cat(parts, dim=-1), "f h w p -> f (h w) 1 p"), dtype, interleaved=interleaved
    )


class ImageRotary(NamedTuple):
    """Rotary angles of a reference's tokens at each `Place`; all hold for one group."""

    backbone: Rotary
    before: Rotary
    beyond: Rotary

    @classmethod
    def build(
        cls,
        own: int,
        first: int,
        height: int,
        width: int,
        dim: int,
        device: torch.device,
        dtype: torch.dtype,
        riflex: Riflex | None = None,
        *,
        interleaved: bool = False,
    ) -> ImageRotary:
        """Compute the angles as `rotary_3d`. own: the backbone's position of references; first: the first frame's."""
        grid = (height, width, dim, device, dtype, riflex)
        places = ((own, (0, 0)), (first - 1, (0, 0)), (first - 1, (height, width)))
        return cls(
            *(rotary_3d((position,), *grid, origin, interleaved=interleaved) for position, origin in places)
        )

    def at(self, place: Place) -> Rotary:
        rotary: Rotary = getattr(self, place)
        return rotary


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_frames(
    frame_positions: FrameIndices,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    group_per_frame: bool,
    riflex: Riflex | None = None,
) -> Rotary:
    """Angles of the frame alone, for temporal attention, where the frames are one group (1 f 1 d).

    group_per_frame: every frame is a group (f 1 1 d).
    """
    angle = _angles(frame_positions, dim // 2, device, riflex)
    return Rotary.of(rearrange(angle, "f p -> f 1 1 p" if group_per_frame else "f p -> 1 f 1 p"), dtype)


def _angles(
    positions: FrameIndices, pairs: int, device: torch.device, riflex: Riflex | None = None
) -> Tensor:
    frequency = 10_000.0 ** (-torch.arange(pairs, device=device, dtype=torch.float64) / pairs)
    if riflex is not None:
        frequency = riflex_frequencies(frequency, riflex)
    position = torch.tensor(tuple(positions), device=device).double()
    return rearrange(position, "n -> n 1") * frequency


def riflex_frequencies(frequency: Tensor, riflex: Riflex) -> Tensor:
    """Lower the intrinsic frequency so that a longer video stays within 90 % of one period (RIFLEx, eq. 8).

    The intrinsic frequency is the one whose period is nearest the frame from which on the video would repeat. A video
    no longer than those of the training keeps its frequencies. frequency: of every pair, in radians per frame.
    """
    if riflex.length <= riflex.trained:
        return frequency
    intrinsic = (2 * math.pi / frequency - riflex.trained).abs().argmin()
    changed = frequency.clone()
    changed[intrinsic] = 0.9 * 2 * math.pi / riflex.length
    return changed
