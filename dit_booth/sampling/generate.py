"""From image prompts and captions to videos."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, Self

import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.attention import Clip, Riflex, WindowFusion
from dit_booth.components import Components
from dit_booth.diffusion.clip_sampling import ClipSampler, Known, continuations, predict_frames
from dit_booth.diffusion.free_noise import reschedule
from dit_booth.diffusion.guidance import Branch, GuidanceConfig
from dit_booth.diffusion.inversion import invert
from dit_booth.diffusion.known_frames import frame_times
from dit_booth.diffusion.noise import randn
from dit_booth.diffusion.samplers import Model, SamplerConfig, sample
from dit_booth.diffusion.start import StartConfig, warped_start
from dit_booth.inject import Condition, Reference, timestep_of_reference
from dit_booth.models.clip.encoders import NULL_PROMPT, Prompt
from dit_booth.models.layers import Attention

log = logging.getLogger(__name__)


@torch.no_grad()
def generate(
    components: Components,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    seeds: Sequence[int],
    *,
    size: tuple[int, int, int],
    guidance: GuidanceConfig,
    sampler: SamplerConfig,
    start: StartConfig = StartConfig(),  # noqa: B008 (frozen)
    known: KnownVideo | None = None,
    use_image: bool = True,
    reuse: bool = True,
    riflex: int = 0,
) -> Tensor:
    """Sample one video per row: (b f 3 h w) in [-1, 1].

    images: (b 3 s s) in [-1, 1]; `size` is (frames, height, width) in pixels. A row's noise depends on its seed
    alone, so a video is the same in every batch. Conditions that are the same at every timestep are made once; with
    `reuse` false they are made at every step, which gives the same videos. `start`: what the latents start from.
    `known`: frames that stay, around which the others are sampled. With a strategy that tells the network which frames
    are known (LVDM), frames beyond those of the data are predicted clip by clip (section `clips`).
    `riflex`: frames of the training, for longer videos of a model with rotary time; 0: its frequencies stay.
    ValueError: a size that the autoencoder or the backbone cannot cut, or an image prompt that is all white.
    """
    components.model.eval()
    frames, height, width = size
    factor, channels = components.autoencoder.factor, components.autoencoder.channels
    if height % factor or width % factor:
        raise ValueError(f"size is {height} x {width} pixels; the autoencoder needs multiples of {factor}")
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts, with_image = Prompts(images, captions, subjects), use_image and bool(components.model.active)
    count = clip_frames(components, frames)
    clip = clip_of(components, count, start, riflex)
    network = GuidedNetwork.build(
        components, guidance, prompts, draws, clip, with_image=with_image, reuse=reuse
    )

    def run(model: Model, noise: Tensor, step: int = 0) -> Tensor:
        return sample(model, components.objective, sampler, noise, draws, steps=range(step, sampler.steps))

    config = components.config.clips
    clips = ClipSampler(network.predict, components.objective, run, config, draws)
    if known is None:
        shape = (len(images), count, channels, height // factor, width // factor)
        noise = randn(shape, draws, images.device, network.dtype)
        latents = run(network.predict, *start_latents(network, sampler, start, noise))
    else:
        known.check(len(images), count)
        latents = clips.complete(
            components.autoencoder.encode(known.video, draws).to(network.dtype), known.mask
        )
    latents = predict_frames(clips, latents, continuations(frames, count, config.overlap))[:, :frames]
    return components.autoencoder.decode(latents).clamp(-1, 1)


def clip_frames(components: Components, frames: int) -> int:
    """Return the frames of the first clip: all, or those of the data where the network can predict the others."""
    predicts = components.model.strategy.reads_known_frames(components.model.active)
    return min(frames, components.config.data.frames) if predicts else frames


class KnownVideo(NamedTuple):
    """Frames that are known before sampling, among any others."""

    video: Tensor  # b f 3 h w in [-1, 1]
    mask: Tensor  # b f 1 1 1, 1 in frames that are known

    def check(self, rows: int, frames: int) -> None:
        """Raise ValueError if the shapes are not those of a clip."""
        if self.video.shape[:2] != (rows, frames) or self.mask.shape != (rows, frames, 1, 1, 1):
            raise ValueError(
                f"known has a video {tuple(self.video.shape)} and a mask {tuple(self.mask.shape)}; give (b f 3 h w) and"
                f" (b f 1 1 1) with b = {rows}, the prompts, and f = {frames}, the frames of a clip"
            )


def clip_of(components: Components, frames: int, start: StartConfig, riflex: int) -> Clip:
    """Return all frames of a video as the network shall see them. ValueError: freenoise, and no temporal attention."""
    long = Riflex(riflex, frames) if riflex else None
    if start.kind != "freenoise":
        return Clip(range(frames), riflex=long)
    attentions = (m for m in components.model.backbone.modules() if isinstance(m, Attention))
    if not any(attention.site.role == "temporal" for attention in attentions):
        raise ValueError(
            "start.kind is freenoise, whose windows are of temporal attention, and the backbone has none (dit.layout"
            " joint or image); use a factorised or interleaved one, or start.kind noise"
        )
    trained = components.config.data.frames
    window = start.window or trained
    if window > trained:
        _warn_of_window(window, trained)
    return Clip(range(frames), fusion=WindowFusion(window, min(start.stride, window)), riflex=long)


@cache
def _warn_of_window(window: int, trained: int) -> None:
    """Warn once for each pair."""
    log.warning(
        "start.window is %d, but data.frames, of the training, is %d: windows are longer than what was learned",
        window,
        trained,
    )


def start_latents(
    network: GuidedNetwork, sampler: SamplerConfig, start: StartConfig, noise: Tensor
) -> tuple[Tensor, int]:
    """Return what a video's latents (b f c h w) start from, made of `noise` where the start wants it, and the step."""
    if start.kind == "warp":
        objective = network.components.objective
        return warped_start(network.predict, objective, sampler, start, noise, network.draws)
    if start.kind == "inversion":
        return inverted_video(network.components, sampler, noise), 0
    fusion = network.clip.fusion
    return noise if fusion is None else reschedule(noise, fusion.window, fusion.stride, network.draws), 0


def inverted_video(components: Components, sampler: SamplerConfig, like: Tensor) -> Tensor:
    """Return the noise that samples `subject.video`, once per row of `like` (b f c h w): null prompt, no guidance.

    Tune-A-Video (arXiv 2212.11565, section 4.2). ValueError: no such video, or a sampler that draws noise.
    """
    config, frames = components.config, like.shape[1]
    video = config.subject.read_video(frames, config.data.size).to(like.device)
    x0 = components.autoencoder.encode(rearrange(video, "f c h w -> 1 f c h w"), None).to(like.dtype)
    nothing = Pass(components.tokenize([NULL_PROMPT], [None]), None)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return nothing.predict(components, x, timestep, None)

    noise = invert(predict, components.objective, sampler, x0)
    return repeat(noise, "1 f c h w -> b f c h w", b=len(like))


@dataclass(frozen=True)
class Pass:
    """One pass through the network in a step: the rows of one or more branches of guidance."""

    prompt: Prompt
    reference: Reference | None
    constant: Mapping[str, Condition] = field(default_factory=dict)

    def with_constant_conditions(self, components: Components) -> Pass:
        """Return a copy with the conditions that are the same at every timestep."""
        if self.reference is None:
            return self
        return replace(self, constant=components.model.constant_conditions(self.reference))

    def predict(
        self,
        components: Components,
        x: Tensor,
        timestep: Tensor,
        eps: Tensor | None,
        known: Tensor | None = None,
        clip: Clip | None = None,
    ) -> Tensor:
        """Predict for this pass's rows: those of x (b f c h w), repeated for each branch.

        known: b f 1 1 1, 1 in frames of x that are known. clip: the frames of x in a longer video; none: x is all.
        """
        rows, reference = len(self.prompt.ids) // len(x), self.reference
        x, timestep = (repeat(y, "b ... -> (r b) ...", r=rows) for y in (x, timestep))
        known = None if known is None else repeat(known, "b ... -> (r b) ...", r=rows)
        if reference is not None:
            assert eps is not None
            eps = repeat(eps, "b ... -> (r b) ...", r=rows)
            t = components.objective.from_timestep(timestep_of_reference(timestep))
            noisy = components.objective.noise(components.copies(reference), t, eps)
            reference = replace(reference, noisy=noisy)
        output: Tensor = components.model(
            x, timestep, self.prompt, reference, self.constant, known, clip
        ).output
        return output


class Prompts(NamedTuple):
    """What videos are sampled of, a row each."""

    images: Tensor  # b 3 s s in [-1, 1]
    captions: Sequence[str]
    subjects: Sequence[str | None]


@dataclass(frozen=True)
class GuidedNetwork:
    """The network as a sampler sees it: guided, for a batch of prompts."""

    components: Components
    guidance: GuidanceConfig
    passes: Sequence[Pass]
    draws: Sequence[torch.Generator]
    """One of each row: of the reference's noise, and of the sampler's."""
    clip: Clip
    """A whole video; passes over fewer frames are videos of their own."""
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        components: Components,
        guidance: GuidanceConfig,
        prompts: Prompts,
        draws: Sequence[torch.Generator],
        clip: Clip,
        *,
        with_image: bool,
        reuse: bool,
    ) -> Self:
        """Encode the prompts. ValueError: an image prompt that is all white."""
        if with_image:
            components.check_images(prompts.images, prompts.captions)
        dtype = next(components.model.parameters()).dtype
        passes = make_passes(components, guidance, *prompts, dtype, with_image)
        if reuse:
            passes = [one.with_constant_conditions(components) for one in passes]
        return cls(components, guidance, passes, draws, clip, dtype)

    def predict(self, x: Tensor, timestep: Tensor, known: Known | None = None) -> Tensor:
        """Predict at x (b f c h w), in which frames may be known; `timestep` (b,) is that of the others."""
        eps, shown = None, None
        if known is not None:
            timestep, shown = frame_times(timestep, known.timestep, known.mask), known.shown
        if (first := self.passes[0].reference) is not None:
            shape = (len(x), *self.components.copies(first).shape[1:])
            eps = randn(shape, self.draws, x.device, x.dtype)
        clip = (
            self.clip if x.shape[1] == len(self.clip.frames) else None
        )  # else, a warp's first frame, or a clip
        output = torch.cat(
            [one.predict(self.components, x, timestep, eps, shown, clip) for one in self.passes]
        )
        return self.guidance.combine(output.chunk(len(output) // len(x)))


def make_passes(
    components: Components,
    guidance: GuidanceConfig,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    dtype: torch.dtype,
    use_image: bool,
) -> list[Pass]:
    """Return the passes of every step; their rows are those of guidance's branches, in order.

    Without its text a branch has the null prompt, without its image the zero image, as rows that training drops have;
    with ``guidance.unconditional=omit`` it has no image at all, hence a pass of its own.
    """

    def one(branches: Sequence[Branch], with_image: bool) -> Pass:
        words = [word for b in branches for word in (captions if b.text else [NULL_PROMPT] * len(images))]
        named = [name for b in branches for name in (subjects if b.text else [None] * len(images))]
        pictures = torch.cat([images if b.image else torch.zeros_like(images) for b in branches])
        reference = components.reference(pictures, dtype) if with_image else None
        return Pass(components.tokenize(words, named), reference)

    branches = guidance.branches()
    if guidance.unconditional == "zero_image":
        return [one(branches, use_image)]
    groups = [[b for b in branches if b.image is image] for image in (True, False)]
    return [one(group, use_image and group[0].image) for group in groups if group]
