"""Clips of a long video, each conditioned on frames of others (LVDM, arXiv 2211.13221, section 3.3).

A prediction model continues from the last frames of the previous clip, which gives sparse frames of any number; an
interpolation model fills the gap between each two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from dit_booth.diffusion.frame_conditioning import network_input, put_frames
from dit_booth.diffusion.guidance import guide
from dit_booth.diffusion.inversion import DDIMPath
from dit_booth.diffusion.noise import Generators, randn_like
from dit_booth.diffusion.objectives import EpsObjective
from dit_booth.errors import check_ranges

ClipModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""model(latents and mask (b f (c + 1) h w), t (b,), timestep (b,) of the given frames, or None without any) -> eps."""


@dataclass(frozen=True, kw_only=True)
class ClipSamplingConfig:
    """Options of sampling with given frames; the defaults are LVDM's."""

    level: int = 100
    """Timestep, of 1000, to which the given frames are noised, once for each clip."""
    guidance: float = 0.1
    """w in e + w (e - e_uncond), e_uncond being predicted without mask and level; 0: none."""
    eta: float = 1.0
    """Fresh noise of DDIM, in the last step, too."""
    released: bool = False
    """As the released code: a prediction's mask says that all frames are given, and interpolation fills a third of the
    gaps (docs/fidelity.md)."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        check_ranges(self, "clip_sampling", level="[0, 999]", guidance="[0, 1000]", eta="[0, 1]")


class Given(NamedTuple):
    """The frames of a clip that are given."""

    x: Tensor  # b f c h w, noised; anything at the other frames
    mask: Tensor  # b f 1 1 1, 1 where they are
    shown: Tensor  # b f 1 1 1, the mask that the network sees
    level: Tensor  # b, their timestep


# ---- the frames of a long video ----------------------------------------------------------------------------


def sparse_frames(frames: int, interpolated: int) -> int:
    """Return how many sparse frames span at least `frames`, clips of `interpolated` frames between each two of them."""
    return ceil((frames - 1) / (interpolated - 1)) + 1


def continuations(frames: int, clip: int, overlap: int = 1) -> int:
    """Return how many clips follow the first one for at least `frames`, each adding `clip` - `overlap`."""
    return max(ceil((frames - clip) / (clip - overlap)), 0)


def windows(sparse: int, released: bool = False) -> int:
    """Return how many gaps between sparse frames are filled: all, or by the released loop one for each three frames."""
    return len(range(0, sparse - 3, 3)) if released else sparse - 1


# ---- sampling ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSampler:
    """DDIM over clips (b f c h w) of a model that predicts eps; noise is drawn in the order in which it is used."""

    model: ClipModel
    objective: EpsObjective
    path: DDIMPath
    config: ClipSamplingConfig
    generator: Generators

    @torch.no_grad()
    def sample(self, noise: Tensor, given: Given | None = None) -> Tensor:
        """Run from noise to a clip, the given frames put back before each prediction: the update starts from them."""
        x = noise
        for i in reversed(range(len(self.path))):
            x = x if given is None else put_frames(x, given.x, given.mask)
            eps = self.predict(x, self.path.t(i, x), given)
            x = self.path.denoise(i, x, eps, self.config.eta, randn_like(x, self.generator))
        return x

    def predict(self, x: Tensor, t: Tensor, given: Given | None) -> Tensor:
        """Predict eps, guided by what is given; the unconditional prediction sees the frames, too, but not the mask."""
        nothing = torch.zeros_like(x[:, :, :1, :1, :1])
        if given is None:
            return self.model(network_input(x, nothing), t, None)
        eps = self.model(network_input(x, given.shown), t, given.level)
        if not self.config.guidance:
            return eps
        return guide(eps, self.model(network_input(x, nothing), t, None), 1 + self.config.guidance)

    def extend(self, clip: Tensor, overlap: int = 1) -> Tensor:
        """Sample the clip (b f c h w) that continues another one; its first `overlap` frames are those given."""
        places = torch.zeros_like(clip[:1, :, :1, :1, :1])
        places[:, :overlap] = 1
        shown = torch.ones_like(places) if self.config.released else places
        given = self.give(clip[:, -overlap:], places, shown)
        return self.sample(self.fresh(clip), given)

    def fill(self, first: Tensor, last: Tensor, frames: int) -> Tensor:
        """Sample a clip of `frames` from its first to its last frame (b 1 c h w each), which are given."""
        places = torch.zeros(1, frames, 1, 1, 1, dtype=first.dtype, device=first.device)
        places[:, 0] = places[:, -1] = 1
        given = self.give(torch.cat([first, last], dim=1), places, places)
        return self.sample(self.fresh(given.x), given)

    def give(self, frames: Tensor, places: Tensor, shown: Tensor) -> Given:
        """Noise frames (b g c h w) to the level and lay them at their places (1 f 1 1 1)."""
        level = torch.full((len(frames),), self.config.level, device=frames.device)
        noised = self.objective.noise(frames, level, randn_like(frames, self.generator))
        x = noised.new_zeros(len(frames), places.shape[1], *frames.shape[2:])
        x[:, places.flatten().bool()] = noised
        places, shown = (y.expand(len(frames), -1, -1, -1, -1) for y in (places, shown))
        return Given(x, places, shown, level)

    def fresh(self, like: Tensor) -> Tensor:
        """Draw a clip's initial noise."""
        return randn_like(like, self.generator)


def predict_frames(sampler: ClipSampler, first: Tensor, clips: int, overlap: int = 1) -> Tensor:
    """Continue a clip (b f c h w) by `clips` more, each from the last `overlap` frames before it: (b g c h w)."""
    found, clip = [first], first
    for _ in range(clips):
        clip = sampler.extend(clip, overlap)
        found.append(clip[:, overlap:])
    return torch.cat(found, dim=1)


def interpolate_frames(sampler: ClipSampler, sparse: Tensor, frames: int) -> Tensor:
    """Fill each gap of sparse frames (b g c h w) by a clip of `frames`, keeping the sparse ones: (b n c h w).

    n = (g - 1) (frames - 1) + 1; fewer with `released`, which stops after the first gaps.
    """
    found, count = [], windows(sparse.shape[1], sampler.config.released)
    for i in range(count):
        first, last = sparse[:, i : i + 1], sparse[:, i + 1 : i + 2]
        found += [first, sampler.fill(first, last, frames)[:, 1:-1]]
    return torch.cat([*found, sparse[:, count : count + 1]], dim=1)
