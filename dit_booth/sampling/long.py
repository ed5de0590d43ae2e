"""Latents of a video some frames at a time, from its beginning, at a memory that does not grow with the video."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.attention import Clip, FrameCache, PrefixCache
from dit_booth.config import LongConfig
from dit_booth.diffusion.clip_sampling import ClipSampler
from dit_booth.diffusion.frame_queue import FrameSteps, steps_of
from dit_booth.diffusion.noise import compute_dtype, randn
from dit_booth.diffusion.samplers import Model, SamplerConfig, sample
from dit_booth.diffusion.start import WarpedStart
from dit_booth.models.assemble import Backbone
from dit_booth.sampling.network import GuidedNetwork
from dit_booth.training.stage import frames_of_training

log = logging.getLogger(__name__)
State = Mapping[str, Tensor]
"""What a sampler goes on from, by name."""
IN_PARTS = ("chunks", "diffusion_forcing", "lvdm")
"""Kinds of `sample.long` whose videos are made in parts."""


class LatentSampler(ABC):
    """Samples `frames` frames of latents (b k c h w at a time); between two blocks its state can be saved.

    shape: (c, h, w) of a frame.
    """

    def __init__(
        self, network: GuidedNetwork, sampler: SamplerConfig, frames: int, shape: tuple[int, int, int]
    ) -> None:
        self.network, self.sampler, self.frames, self.shape = network, sampler, frames, shape
        self.done = 0

    @abstractmethod
    def block(self) -> Tensor:
        """Sample the next frames (b k c h w), not beyond the last one."""

    def next_block(self) -> Tensor:
        """Sample the next frames, and count them."""
        assert self.done < self.frames, "the video is complete"
        latents = self.block()
        self.done += latents.shape[1]
        return latents

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on after the last block, of bounded size."""
        draws = torch.stack([draw.get_state() for draw in self.network.draws])
        return {"done": torch.tensor(self.done), "draws": draws}

    def restore(self, state: State) -> None:
        """Go on from a state, as if there had been no interruption."""
        self.done = int(state["done"])
        for draw, own in zip(self.network.draws, state["draws"], strict=True):
            draw.set_state(own)

    def noise(self, frames: int) -> Tensor:
        """Draw the initial noise of frames."""
        network = self.network
        rows, device = len(network.draws), network.components.device
        return randn((rows, frames, *self.shape), network.draws, device, network.dtype)

    def run(self, model: Model, noise: Tensor, step: int = 0) -> Tensor:
        """Take the sampler's steps from `step` on."""
        objective, steps = self.network.components.objective, range(step, self.sampler.steps)
        return sample(model, objective, self.sampler, noise, self.network.draws, steps=steps)


def window_of(network: GuidedNetwork, long: LongConfig) -> int:
    """Return the frames that one pass sees. ValueError: the prefix leaves no new ones."""
    return long.window_of(frames_of_training(network.components.config))


# ---- frames that are finished and still read ---------------------------------------------------------------


class PastFrames:
    """Latents of finished frames, as many as later ones are given: the last ones, and those that the plans name."""

    def __init__(self, backbone: Backbone, last: int) -> None:
        plans = (backbone.plan, backbone.temporal_plan)
        self.plans = [plan for plan in plans if plan is not None and plan.causal]
        self.last = last
        self.latents: dict[int, Tensor] = {}
        """Frame -> b c h w."""

    def before(self, start: int) -> list[int]:
        """Return the frames before `start` that frames from `start` on are given, rising."""
        named = {frame for plan in self.plans for frame in plan.kept(start)}
        return sorted(named.union(range(max(start - self.last, 0), start)))

    def add(self, start: int, latents: Tensor) -> None:
        """Keep finished frames (b k c h w) from `start` on, and drop those that no later frame is given."""
        every = self.latents | dict(enumerate(latents.unbind(1), start))
        kept = self.before(start + latents.shape[1])
        # copies, or each would hold its chunk's memory
        self.latents = {frame: every[frame].clone() for frame in kept if frame in every}

    def stack(self, frames: Sequence[int]) -> Tensor:
        """Return the latents of frames (b m c h w)."""
        return torch.stack([self.latents[frame] for frame in frames], dim=1)

    def state(self) -> dict[str, Tensor]:
        if not self.latents:
            return {}
        return {"past.frames": torch.tensor(list(self.latents)), "past": self.stack(list(self.latents))}

    def restore(self, state: State, like: Tensor) -> None:
        if "past" in state:
            latents = state["past"].to(like.device, like.dtype).unbind(1)
            self.latents = dict(zip(state["past.frames"].tolist(), latents, strict=True))


# ---- chunks ------------------------------------------------------------------------------------------------


class Chunks(LatentSampler):
    """Chunks, each continuing from a prefix: clean past frames, at timestep 0.

    The prefix is the last frames, and those that causal plans name (frame 0, keyframes). With it every frame has a
    timestep of its own; the reference has that of frame 0 of the pass, which is clean, so that conditions are made
    once. Where plans are causal, so are the prefix's keys and values, by one pass in each chunk.
    """

    def __init__(
        self,
        network: GuidedNetwork,
        sampler: SamplerConfig,
        frames: int,
        shape: tuple[int, int, int],
        long: LongConfig,
        warp: WarpedStart | None = None,
    ) -> None:
        super().__init__(network, sampler, frames, shape)
        self.window, self.prefix, self.warp = window_of(network, long), long.prefix, warp
        backbone = cast(Backbone, network.components.model.backbone)
        self.past = PastFrames(backbone, long.prefix)
        self.plans = _cache_of(backbone) if long.cache else None

    def block(self) -> Tensor:
        """Sample a whole chunk, of as many frames as the training had, and keep what the video still needs."""
        start, left = self.done, self.frames - self.done
        if start == 0:
            latents = self.denoise(self.network.predict, range(min(self.window, left)))
        else:
            latents = self.chunk(start, self.window - self.prefix)[:, :left]
        self.past.add(start, latents)
        return latents

    def chunk(self, start: int, frames: int) -> Tensor:
        """Sample `frames` frames (b k c h w) that follow the finished ones."""
        before, new = self.past.before(start), range(start, start + frames)
        if not before:
            return self.denoise(lambda x, t: self.network.predict(x, t, clip=self.clip(new)), new)
        prefix = self.past.stack(before)
        network = self.network.at_timestep(0.0, prefix)
        clean = prefix.new_zeros(prefix.shape[:2], dtype=torch.float32)
        if self.plans is not None:
            caches = [PrefixCache(self.plans.plans, before) for _ in network.passes]
            network.predict(prefix, clean, clip=self.clip(before), caches=caches)
            return self.denoise(lambda x, t: network.predict(x, t, clip=self.clip(new), caches=caches), new)
        clip = self.clip([*before, *new])

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            own = repeat(timestep, "b -> b f", f=frames).to(clean.dtype)
            times = torch.cat([clean, own], dim=1)
            return network.predict(torch.cat([prefix, x], dim=1), times, clip=clip)[:, len(before) :]

        return self.denoise(predict, new)

    def denoise(self, model: Model, frames: range) -> Tensor:
        """Sample frames of the video from noise, or from the moved latents of frame 0."""
        noise = self.noise(len(frames))
        if self.warp is None:
            return self.run(model, noise)
        latents, step = self.warp.latents(model, noise, frames, self.network.draws)
        return self.run(model, latents, step)

    def clip(self, frames: Sequence[int]) -> Clip:
        return Clip(tuple(frames), riflex=self.network.clip.riflex)

    def state(self) -> dict[str, Tensor]:
        first = None if self.warp is None else self.warp.first
        return {**super().state(), **self.past.state(), **({} if first is None else {"first": first})}

    def restore(self, state: State) -> None:
        like = self.noise(0)
        self.past.restore(state, like)
        if self.warp is not None and "first" in state:
            self.warp.first = state["first"].to(like.device)
        super().restore(state)


def _cache_of(backbone: Backbone) -> FrameCache | None:
    """Return the backbone's empty cache, or None where past frames depend on later ones."""
    try:
        return backbone.make_frame_cache()
    except ValueError as reason:
        log.info("the prefix is computed in every step: %s", reason)
        return None


# ---- a queue -----------------------------------------------------------------------------------------------


class Queue(LatentSampler):
    """A queue of as many frames as the sampler has steps, each at a noise level of its own (`frame_queue`)."""

    def __init__(
        self,
        network: GuidedNetwork,
        sampler: SamplerConfig,
        frames: int,
        shape: tuple[int, int, int],
        long: LongConfig,
    ) -> None:
        super().__init__(network, sampler, frames, shape)
        self.window, self.prefix = window_of(network, long), long.prefix
        self.steps = FrameSteps(network.components.objective, sampler)
        self.past = PastFrames(cast(Backbone, network.components.model.backbone), long.prefix)
        self.queue: Tensor | None = None  # b s c h w; its first frame is that after the finished ones

    def block(self) -> Tensor:
        """Take steps until a window of frames is finished."""
        if self.queue is None:
            noise = self.noise(self.sampler.steps)
            self.queue = noise.to(compute_dtype(noise))
            for step in range(self.sampler.steps - 1):  # until frame 0 has one step left
                self.queue = self.stepped(self.queue, 0, step)
        finished = [self.pop(self.done + i) for i in range(min(self.window, self.frames - self.done))]
        return torch.stack(finished, dim=1)

    def pop(self, first: int) -> Tensor:
        """Take the step after which frame `first`, the queue's first, is finished, and append noise: b c h w."""
        assert self.queue is not None
        queue = self.stepped(self.queue, first, first + self.sampler.steps - 1)
        self.queue = torch.cat([queue[:, 1:], self.noise(1).to(queue.dtype)], dim=1)
        latents = queue[:, 0].to(self.network.dtype)
        self.past.add(first, rearrange(latents, "b c h w -> b 1 c h w"))
        return latents

    def stepped(self, queue: Tensor, first: int, step: int) -> Tensor:
        """Return the queue, whose first frame is `first`, after a step, which frames that wait do not take."""
        count = queue.shape[1]
        own, active = (y.to(queue.device) for y in steps_of(first, count, step, self.sampler.steps))
        own = repeat(own, "f -> b f", b=len(queue))
        denoised = self.window - self.prefix
        predictions = [
            self.predict(queue, own, first, start, min(start + denoised, count))
            for start in range(0, count, denoised)
        ]
        x0 = self.steps.x0(torch.cat(predictions, dim=1), queue, own)
        after = self.steps.advance(x0, queue, own, self.network.draws)
        return torch.where(rearrange(active, "f -> f 1 1 1"), after, queue)

    def predict(self, queue: Tensor, own: Tensor, first: int, start: int, stop: int) -> Tensor:
        """Predict the queue's frames from `start` to `stop`, which see frames before them, finished ones or not."""
        frames = [*self.past.before(first + start), *range(first + start, first + stop)]
        latents, timesteps = [], []
        timestep = self.network.components.objective.timestep(self.steps.t(own))  # b f
        for frame in frames:
            waiting = frame >= first
            latents.append(queue[:, frame - first] if waiting else self.past.latents[frame].to(queue.dtype))
            timesteps.append(timestep[:, frame - first] if waiting else torch.zeros_like(timestep[:, 0]))
        x, t = torch.stack(latents, dim=1).to(self.network.dtype), torch.stack(timesteps, dim=1)
        clip = Clip(tuple(frames), riflex=self.network.clip.riflex)
        return self.network.predict(x, t, clip=clip)[:, -(stop - start) :]

    def state(self) -> dict[str, Tensor]:
        assert self.queue is not None
        return {**super().state(), **self.past.state(), "queue": self.queue}

    def restore(self, state: State) -> None:
        like = self.noise(0)
        self.past.restore(state, like)
        self.queue = state["queue"].to(like.device)
        super().restore(state)


# ---- known frames ------------------------------------------------------------------------------------------


class Predicted(LatentSampler):
    """Clips that continue each other, and clips that interpolate between their frames (LVDM, `clip_sampling`)."""

    def __init__(
        self,
        network: GuidedNetwork,
        sampler: SamplerConfig,
        frames: int,
        shape: tuple[int, int, int],
        clips: ClipSampler,
        between: ClipSampler,
        first: Tensor | None,
        interpolated: int,
    ) -> None:
        super().__init__(network, sampler, frames, shape)
        self.clips, self.between, self.first, self.interpolated = clips, between, first, interpolated
        self.clip: Tensor | None = None  # b f c h w, the last one that was predicted
        self.sparse: Tensor | None = None  # b g c h w, frames to interpolate between

    def block(self) -> Tensor:
        left = self.frames - self.done
        if not self.interpolated:
            return self.predict()[:, :left]
        while self.sparse is None or self.sparse.shape[1] < min(2, left):
            new = self.predict()
            self.sparse = new if self.sparse is None else torch.cat([self.sparse, new], dim=1)
        if left == 1:
            return self.sparse[:, :1]
        start, end, self.sparse = self.sparse[:, :1], self.sparse[:, 1:2], self.sparse[:, 1:]
        return self.between.fill(start, end, self.interpolated)[:, :-1][:, :left]

    def predict(self) -> Tensor:
        """Return the frames of the first clip, or the new ones of a clip that continues the last one."""
        if self.clip is None:
            frames = len(self.network.clip.frames)
            self.clip = self.clips.sample(self.noise(frames)) if self.first is None else self.first
            return self.clip
        self.clip = self.clips.extend(self.clip)
        return self.clip[:, self.clips.config.overlap :]

    def state(self) -> dict[str, Tensor]:
        assert self.clip is not None
        sparse = {} if self.sparse is None else {"sparse": self.sparse}
        return {**super().state(), "clip": self.clip, **sparse}

    def restore(self, state: State) -> None:
        like = self.noise(0)
        self.clip = state["clip"].to(like)
        self.sparse = state["sparse"].to(like) if "sparse" in state else None
        super().restore(state)


# ---- warnings ----------------------------------------------------------------------------------------------


@cache
def warn_of_window(window: int, trained: int) -> None:
    """Warn once for each pair of a window and a training's frames."""
    log.warning(
        "sample.long.window is %d, but the training's videos have %d frames: the network never saw as many",
        window,
        trained,
    )


@cache
def warn_of_timesteps(kind: str) -> None:
    """Warn once that the network was not trained with frames at several noise levels."""
    log.warning(
        "sample.long.kind %s gives frames timesteps of their own, but objective.per_frame, of the training, is false:"
        " the network never saw frames at several noise levels",
        kind,
    )
