"""From image prompts and captions to videos."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.attention import Clip, Riflex, WindowFusion
from dit_booth.components import Components
from dit_booth.diffusion.free_noise import reschedule
from dit_booth.diffusion.guidance import Branch, GuidanceConfig
from dit_booth.diffusion.inversion import invert
from dit_booth.diffusion.noise import randn
from dit_booth.diffusion.samplers import SamplerConfig, sample
from dit_booth.diffusion.start import StartConfig, warped_start
from dit_booth.inject import Condition, Reference
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
    use_image: bool = True,
    reuse: bool = True,
    riflex: int = 0,
) -> Tensor:
    """Sample one video per row: (b f 3 h w) in [-1, 1].

    images: (b 3 s s) in [-1, 1]; `size` is (frames, height, width) in pixels. A row's noise depends on its seed
    alone, so a video is the same in every batch. Conditions that are the same at every timestep are made once; with
    `reuse` false they are made at every step, which gives the same videos. `start`: what the latents start from.
    `riflex`: frames of the training, for longer videos of a model with rotary time; 0: its frequencies stay.
    ValueError: a size that the autoencoder or the backbone cannot cut.
    """
    device, dtype = images.device, next(components.model.parameters()).dtype
    components.model.eval()
    frames, height, width = size
    factor, channels = components.autoencoder.factor, components.autoencoder.channels
    if height % factor or width % factor:
        raise ValueError(f"size is {height} x {width} pixels; the autoencoder needs multiples of {factor}")
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    clip = clip_of(components, frames, start, riflex)
    batch, with_image = len(images), use_image and bool(components.model.active)
    passes = make_passes(components, guidance, images, captions, subjects, dtype, with_image)
    if reuse:
        passes = [one.with_constant_conditions(components) for one in passes]

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        eps = None
        if (first := passes[0].reference) is not None:
            eps = randn((batch, *components.copies(first).shape[1:]), draws, device, dtype)
        shown = clip if x.shape[1] == frames else None  # a warp's first frame is a video of its own
        output = torch.cat([one.predict(components, x, timestep, eps, shown) for one in passes])
        return guidance.combine(output.chunk(len(output) // batch))

    latents = randn((batch, frames, channels, height // factor, width // factor), draws, device, dtype)
    objective, step = components.objective, 0
    if clip.fusion is not None:
        latents = reschedule(latents, clip.fusion.window, clip.fusion.stride, draws)
    if start.kind == "warp":
        latents, step = warped_start(predict, objective, sampler, start, latents, draws)
    elif start.kind == "inversion":
        latents = inverted_video(components, sampler, latents)
    latents = sample(predict, objective, sampler, latents, draws, steps=range(step, sampler.steps))
    return components.autoencoder.decode(latents).clamp(-1, 1)


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
        clip: Clip | None = None,
    ) -> Tensor:
        """Predict for this pass's rows: those of x (b f c h w), repeated for each branch."""
        rows, reference = len(self.prompt.ids) // len(x), self.reference
        x, timestep = (repeat(y, "b ... -> (r b) ...", r=rows) for y in (x, timestep))
        if reference is not None:
            assert eps is not None
            eps = repeat(eps, "b ... -> (r b) ...", r=rows)
            t = components.objective.from_timestep(timestep)
            noisy = components.objective.noise(components.copies(reference), t, eps)
            reference = replace(reference, noisy=noisy)
        output: Tensor = components.model(
            x, timestep, self.prompt, reference, self.constant, clip=clip
        ).output
        return output


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
