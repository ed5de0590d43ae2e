"""Clips of a long video, each conditioned on frames of others (LVDM, arXiv 2211.13221, section 3.3).

A prediction model continues from the last frames of the previous clip, which gives sparse frames of any number; an
interpolation model fills the gap between each two of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from dit_booth.diffusion.guidance import guide
from dit_booth.diffusion.known_frames import put_frames
from dit_booth.diffusion.noise import Generators, randn_like
from dit_booth.diffusion.objectives import Objective
from dit_booth.diffusion.samplers import Model
from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Options of sampling with known frames; the defaults are LVDM's."""

    overlap: int = 1
    """Last frames of a clip from which the next one is predicted."""
    level: int = 100
    """Timestep, of 1000, to which the known frames are noised, once for each clip."""
    guidance: float = 0.1
    """w in e + w (e - e_uncond), e_uncond being predicted without mask and level; 0: none."""
    released: bool = False
    """As the released code: a prediction's mask says that all frames are known, and interpolation fills a third of the
    gaps (docs/fidelity.md)."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        check_ranges(self, "clips", overlap="[1, 100000]", level="[0, 999]", guidance="[0, 1000]")


class Known(NamedTuple):
    """The known frames of a clip."""

    x: Tensor  # b f c h w, noised; anything at the other frames
    mask: Tensor  # b f 1 1 1, 1 where they are
    shown: Tensor  # b f 1 1 1, the mask that the network sees
    timestep: Tensor  # b, theirs


ClipModel = Callable[[Tensor, Tensor, Known | None], Tensor]
"""model(latents (b f c h w) with the known frames in them, timestep (b,) of the others, known) -> prediction."""


# ---- the frames of a long video ----------------------------------------------------------------------------


def sparse_frames(frames: int, interpolated: int) -> int:
    """Return how many sparse frames span at least `frames`, clips of `interpolated` frames between each two of them."""
    return ceil((frames - 1) / (interpolated - 1)) + 1


def continuations(frames: int, clip: int, overlap: int = 1) -> int:
    """Return how many clips follow the first one for at least `frames`, each adding `clip` - `overlap`.

    ValueError: some must follow, and the overlap is a whole clip.
    """
    if frames <= clip:
        return 0
    check_overlap(overlap, clip)
    return ceil((frames - clip) / (clip - overlap))


def check_overlap(overlap: int, clip: int) -> None:
    if overlap >= clip:
        raise ValueError(f"clips.overlap is {overlap}, of clips with {clip} frames: give fewer")


def windows(sparse: int, released: bool = False) -> int:
    """Return how many gaps between sparse frames are filled: all, or by the released loop one for each three frames."""
    return len(range(0, sparse - 3, 3)) if released else sparse - 1


# ---- sampling ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSampler:
    """Samples clips (b f c h w) with known frames; noise is drawn in the order in which it is used."""

    model: ClipModel
    objective: Objective
    run: Callable[[Model, Tensor], Tensor]
    """run(model(x, timestep) -> prediction, noise) -> clip: all steps of a sampler."""
    config: ClipsConfig
    generator: Generators

    def sample(self, noise: Tensor, known: Known | None = None) -> Tensor:
        """Run from noise to a clip. At the known frames the result means nothing."""
        return self.run(partial(self.predict, known=known), noise)

    def predict(self, x: Tensor, timestep: Tensor, known: Known | None) -> Tensor:
        """Predict, guided by what is known; the unconditional prediction sees the frames, too, but not the mask."""
        if known is None:
            return self.model(x, timestep, None)
        x = put_frames(x, known.x, known.mask)
        prediction = self.model(x, timestep, known)
        if not self.config.guidance:
            return prediction
        return guide(prediction, self.model(x, timestep, None), 1 + self.config.guidance)

    def complete(self, x: Tensor, mask: Tensor) -> Tensor:
        """Sample the frames of a clip (b f c h w) where the mask (b f 1 1 1) is 0, and keep the others."""
        noised, timestep = self.noised(x)
        made = self.sample(self.fresh(x), Known(noised, mask, mask, timestep))
        return put_frames(made, x, mask)

    def extend(self, clip: Tensor) -> Tensor:
        """Sample the clip (b f c h w) that continues another one from its last `overlap` frames.

        ValueError: those are the whole clip.
        """
        overlap, frames = self.config.overlap, clip.shape[1]
        check_overlap(overlap, frames)
        places = torch.zeros_like(clip[:1, :, :1, :1, :1])
        places[:, :overlap] = 1
        shown = torch.ones_like(places) if self.config.released else places
        last = clip[:, -overlap:]
        known = self.lay(last, places, shown)
        return torch.cat([last, self.sample(self.fresh(clip), known)[:, overlap:]], dim=1)

    def fill(self, first: Tensor, last: Tensor, frames: int) -> Tensor:
        """Sample a clip of `frames` from its first to its last frame (b 1 c h w each), which are known."""
        places = torch.zeros(1, frames, 1, 1, 1, dtype=first.dtype, device=first.device)
        places[:, 0] = places[:, -1] = 1
        known = self.lay(torch.cat([first, last], dim=1), places, places)
        return torch.cat([first, self.sample(self.fresh(known.x), known)[:, 1:-1], last], dim=1)

    def lay(self, frames: Tensor, places: Tensor, shown: Tensor) -> Known:
        """Noise frames (b g c h w) to the level and lay them at their places (1 f 1 1 1)."""
        noised, timestep = self.noised(frames)
        x = noised.new_zeros(len(frames), places.shape[1], *frames.shape[2:])
        x[:, places.flatten().bool()] = noised
        places, shown = (y.expand(len(frames), -1, -1, -1, -1) for y in (places, shown))
        return Known(x, places, shown, timestep)

    def noised(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Noise frames (b g c h w) to the level; return its timestep (b,), too."""
        timestep = torch.full((len(frames),), float(self.config.level), device=frames.device)
        t = self.objective.from_timestep(timestep)
        return self.objective.noise(frames, t, randn_like(frames, self.generator)), timestep

    def fresh(self, like: Tensor) -> Tensor:
        """Draw a clip's initial noise."""
        return randn_like(like, self.generator)


def predict_frames(sampler: ClipSampler, first: Tensor, clips: int) -> Tensor:
    """Continue a clip (b f c h w) by `clips` more, each from the last frames before it: (b g c h w)."""
    found, clip = [first], first
    for _ in range(clips):
        clip = sampler.extend(clip)
        found.append(clip[:, sampler.config.overlap :])
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
