"""Classifier-free guidance (Ho & Salimans, 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Options of classifier-free guidance."""

    scale: float = 4.0
    """uncond + scale * (cond - uncond); 1 is no guidance. VideoBooth samples with 4."""
    channels: int | None = None
    """Guide only the first so many channels; none: all. VideoBooth's released code guides 3 of 4."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels={self.channels}: guide at least one channel, or leave it out for all")


def guide(
    cond: Tensor, uncond: Tensor, scale: float, channels: slice | int | None = None, axis: int = -3
) -> Tensor:
    """uncond + scale (cond - uncond) (Ho & Salimans eq. 6, with scale = 1 + w).

    cond, uncond: (b f c h w), or any shape with the channels on `axis`. channels: which are guided, an int n
    meaning the first n; the others keep the conditional prediction. Raises ValueError for unequal shapes.
    """
    if cond.shape != uncond.shape:
        raise ValueError(f"cond {tuple(cond.shape)} and uncond {tuple(uncond.shape)} must have equal shapes")
    guided = uncond + scale * (cond - uncond)
    if channels is None:
        return guided
    count = cond.shape[axis]
    if isinstance(channels, int) and not 1 <= channels <= count:
        raise ValueError(
            f"channels={channels}: the prediction has {count}; choose 1 to {count}, or none for all"
        )
    chosen = torch.zeros(count, dtype=torch.bool, device=cond.device)
    chosen[slice(channels) if isinstance(channels, int) else channels] = True
    shape = [1] * cond.ndim
    shape[axis] = count
    return torch.where(chosen.reshape(shape), guided, cond)
