"""From image prompts and captions to videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Required, Self, TypedDict, Unpack

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from dit_booth.attention import Clip, Riflex, WindowFusion
from dit_booth.components import Components
from dit_booth.config import LongConfig
from dit_booth.diffusion.clip_sampling import ClipSampler
from dit_booth.diffusion.free_noise import reschedule
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.inversion import invert
from dit_booth.diffusion.samplers import Model, SamplerConfig, sample
from dit_booth.diffusion.start import StartConfig, WarpedStart
from dit_booth.evaluation.segment import subject_masks
from dit_booth.models.autoencoder.model import StreamDecoder
from dit_booth.models.layers import Attention
from dit_booth.sampling.long import (
    IN_PARTS,
    Chunks,
    LatentSampler,
    Predicted,
    Queue,
    State,
    warn_of_timesteps,
    warn_of_window,
)
from dit_booth.sampling.network import GuidedNetwork, Pass, Prompts
from dit_booth.training.stage import frames_of_training


def generate(
    components: Components,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    seeds: Sequence[int],
    **options: Unpack[SamplingOptions],
) -> Tensor:
    """Sample one video per row: (b f 3 h w) in [-1, 1]. Arguments: see `FrameSampler.build`."""
    sampler = FrameSampler.build(components, images, captions, subjects, seeds, **options)
    return torch.cat(list(sampler), dim=1)


class SamplingOptions(TypedDict, total=False):
    """Options of `generate`."""

    size: Required[tuple[int, int, int]]
    """Frames, height and width, in pixels."""
    guidance: Required[GuidanceConfig]
    sampler: Required[SamplerConfig]
    start: StartConfig
    """What the latents start from."""
    long: LongConfig
    """How videos with more frames than those of the training are made."""
    known: KnownVideo | None
    """Frames that stay, around which the others are sampled."""
    use_image: bool
    reuse: bool
    """Make conditions that are the same at every timestep once; false: at every step, which gives the same videos."""


@dataclass
class FrameSampler:
    """Iterator over the frames of videos, some at a time: (b k 3 h w) in [-1, 1].

    Its state, of bounded size, can be saved between two of them.
    """

    components: Components
    latents: LatentSampler
    decoder: StreamDecoder

    @classmethod
    @torch.no_grad()
    def build(
        cls,
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
        long: LongConfig = LongConfig(),  # noqa: B008 (frozen)
        known: KnownVideo | None = None,
        use_image: bool = True,
        reuse: bool = True,
    ) -> Self:
        """Prepare the sampling of one video per row.

        images: (b 3 s s), or several of each row (b r 3 s s), in [-1, 1]. A row's noise depends on its seed alone, so a
        video is the same in every batch. The other arguments: see `SamplingOptions`.
        ValueError: a size that the autoencoder or the backbone cannot cut, an image prompt that is all white, or a way
        to make long videos that this model or this many frames do not allow.
        """
        components.model.eval()
        frames, height, width = size
        factor, channels = components.autoencoder.factor, components.autoencoder.channels
        if height % factor or width % factor:
            raise ValueError(
                f"size is {height} x {width} pixels; the autoencoder needs multiples of {factor}"
            )
        check_grouped(components, start, long, known)
        frames = components.config.autoencoder.latent_frames(frames)
        check_long(components, frames, start, long, known)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (channels, height // factor, width // factor)
        prompts = Prompts(images, captions, subjects, (frames, *shape[1:]))
        clip = clip_of(components, frames, long)

        def network_of(parts: Components) -> GuidedNetwork:
            shown = use_image and bool(parts.model.active)
            return GuidedNetwork.build(parts, guidance, prompts, draws, clip, with_image=shown, reuse=reuse)

        network, other = network_of(components), components.interpolator
        between = network if other is None or long.kind != "lvdm" else network_of(other)
        latents = make_sampler(network, between, sampler, frames, shape, start, long, known)
        return cls(components, latents, components.autoencoder.stream_decoder())

    @property
    def frames(self) -> int:
        """Frames of the whole video."""
        return self.components.config.autoencoder.video_frames(self.latents.frames)

    @property
    def done(self) -> int:
        """Frames that are made."""
        return self.components.config.autoencoder.video_frames(self.latents.done)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on after the last frames."""
        state = self.latents.state() | self.decoder.state()
        return {name: tensor.clone() for name, tensor in state.items()}

    def restore(self, state: State) -> None:
        """Go on from a state, with the frames that would have followed."""
        self.latents.restore(state)
        self.decoder.restore(state, self.components.device)

    def __iter__(self) -> Self:
        return self

    @torch.no_grad()
    def __next__(self) -> Tensor:
        """Sample the next frames."""
        if self.done == self.frames:
            raise StopIteration
        return self.decoder.decode(self.latents.next_block()).clamp(-1, 1)


def make_sampler(
    network: GuidedNetwork,
    between: GuidedNetwork,
    sampler: SamplerConfig,
    frames: int,
    shape: tuple[int, int, int],
    start: StartConfig,
    long: LongConfig,
    known: KnownVideo | None,
) -> LatentSampler:
    """Build the sampler of a kind of long videos; `between`: the network that interpolates (lvdm)."""
    warp = WarpedStart(network.components.objective, sampler, start) if start.kind == "warp" else None
    match long.kind:
        case "chunks":
            return Chunks(network, sampler, frames, shape, long, warp)
        case "diffusion_forcing":
            return Queue(network, sampler, frames, shape, long)
        case "lvdm":
            clips = clip_sampler(network, sampler)
            first = None if known is None else completed(network, clips, known)
            fill = clip_sampler(between, sampler)
            return Predicted(network, sampler, frames, shape, clips, fill, first, long.interpolated)
        case _:
            return Whole(network, sampler, frames, shape, start, warp, known)


def check_grouped(
    components: Components, start: StartConfig, long: LongConfig, known: KnownVideo | None
) -> None:
    """Check that nothing needs a latent of every frame where the autoencoder groups frames. ValueError: it does."""
    section = components.config.autoencoder
    if section.frames_factor == 1:
        return
    if start.kind == "warp" or known is not None:
        name = "start.kind warp" if known is None else "a video of known frames"
        raise ValueError(
            f"{name} needs a latent of every frame, but autoencoder.kind is {section.kind}, whose latents hold"
            f" {section.frames_factor} frames each; use the default"
        )
    if section.tile and long.kind in IN_PARTS:
        raise ValueError(
            f"sample.long.kind {long.kind} decodes a video in parts, but autoencoder.tile is {section.tile}, and tiles"
            " are those of whole videos; set it to 0"
        )


def check_long(
    components: Components, frames: int, start: StartConfig, long: LongConfig, known: KnownVideo | None
) -> None:
    """Check that a video of `frames` frames can be made so; warn of what the network never saw in its training.

    ValueError: naming the option.
    """
    kind, trained = long.kind, frames_of_training(components.config)
    if kind == "none":
        return
    if start.kind != "noise" and (start.kind, kind) != ("warp", "chunks"):
        raise ValueError(
            f"start.kind is {start.kind}, but sample.long.kind is {kind}: warp is for none and chunks, inversion for"
            " none; set one of them to its default (noise, none)"
        )
    if start.background:
        raise ValueError(
            f"start.background is {start.background}, but sample.long.kind is {kind}: the background is smoothed over a"
            " whole video; set it to 0, or use none"
        )
    if known is not None and kind != "lvdm":
        raise ValueError(f"known frames are given, but sample.long.kind is {kind}; use none or lvdm")
    if kind == "lvdm":
        if not components.model.strategy.reads_known_frames(components.model.active):
            raise ValueError(
                "sample.long.kind is lvdm, but no active strategy tells the network which frames are known; train with"
                " strategy lvdm, or use another kind"
            )
        return
    window = long.window_of(trained)
    if window > trained:
        warn_of_window(window, trained)
    if kind == "freenoise":
        return
    if frames <= long.prefix:
        video = components.config.autoencoder.video_frames(frames)
        raise ValueError(
            f"frames is {video}: the network sees {frames}, no more than the {long.prefix} of sample.long.prefix;"
            " sample more, or lower the prefix"
        )
    if not components.config.objective.per_frame:
        warn_of_timesteps(kind)


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


def clip_of(components: Components, frames: int, long: LongConfig) -> Clip:
    """Return the frames of a first pass: the whole video's, or the first clip's.

    ValueError: freenoise, and no temporal attention.
    """
    trained = frames_of_training(components.config)
    training = components.config.autoencoder.latent_frames(long.riflex or 1, "sample.long.riflex")
    riflex = Riflex(training, frames) if long.riflex else None
    if long.kind == "freenoise":
        return Clip(range(frames), fusion=_fusion(components, long), riflex=riflex)
    counts = {"chunks": long.window or trained, "lvdm": trained}
    return Clip(range(min(frames, counts.get(long.kind, frames))), riflex=riflex)


def _fusion(components: Components, long: LongConfig) -> WindowFusion:
    attentions = (m for m in components.model.backbone.modules() if isinstance(m, Attention))
    if not any(attention.site.role == "temporal" for attention in attentions):
        raise ValueError(
            "sample.long.kind is freenoise, whose windows are of temporal attention, and the backbone has none"
            " (dit.layout joint or image); use a factorised or interleaved one, or another kind"
        )
    window = long.window_of(frames_of_training(components.config))
    return WindowFusion(window, min(long.stride, window))


class Whole(LatentSampler):
    """All frames at once."""

    def __init__(
        self,
        network: GuidedNetwork,
        sampler: SamplerConfig,
        frames: int,
        shape: tuple[int, int, int],
        start: StartConfig,
        warp: WarpedStart | None,
        known: KnownVideo | None,
    ) -> None:
        super().__init__(network, sampler, frames, shape)
        self.start, self.warp, self.known = start, warp, known

    def block(self) -> Tensor:
        network = self.network
        if self.known is not None:
            return completed(network, clip_sampler(network, self.sampler), self.known)
        noise = self.noise(self.frames)
        if self.warp is not None:
            latents, step = self.warp.latents(network.predict, noise, range(self.frames), network.draws)
            sampled = self.run(network.predict, latents, step)
            if not self.start.background:
                return sampled
            latents = self.warp.smooth(latents, foreground_of(network.components, sampled))
            return self.run(network.predict, latents, step)
        if self.start.kind == "inversion":
            return self.run(network.predict, inverted_video(network.components, self.sampler, noise))
        fusion = network.clip.fusion
        if fusion is not None:
            noise = reschedule(noise, fusion.window, fusion.stride, network.draws)
        return self.run(network.predict, noise)


def clip_sampler(network: GuidedNetwork, sampler: SamplerConfig) -> ClipSampler:
    """Return the sampler of clips with known frames (section `clips`)."""
    objective, draws = network.components.objective, network.draws

    def run(model: Model, noise: Tensor) -> Tensor:
        return sample(model, objective, sampler, noise, draws)

    return ClipSampler(network.predict, objective, run, network.components.config.clips, draws)


def completed(network: GuidedNetwork, clips: ClipSampler, known: KnownVideo) -> Tensor:
    """Sample the latents of a clip around its known frames. ValueError: they are not those of a clip."""
    known.check(len(network.draws), len(network.clip.frames))
    latents = network.components.autoencoder.encode(known.video, network.draws)
    return clips.complete(latents.to(network.dtype), known.mask)


def foreground_of(components: Components, latents: Tensor) -> Tensor:
    """Segment the subject of sampled frames (b f c h w), at the latents' resolution: b f 1 h w, 1 where it shows.

    It is what differs from a smooth background (Text2Video-Zero: a network that detects salient objects).
    """
    video = components.autoencoder.decode(latents).float().clamp(-1, 1)
    masks = torch.stack([subject_masks(one) for one in video]).to(latents)
    factor = components.autoencoder.factor
    return reduce(masks, "b f (h i) (w j) -> b f 1 h w", "max", i=factor, j=factor)


def inverted_video(components: Components, sampler: SamplerConfig, like: Tensor) -> Tensor:
    """Return the noise that samples `subject.video`, once per row of `like` (b f c h w): null prompt, no guidance.

    Tune-A-Video (arXiv 2212.11565, section 4.2). ValueError: no such video, or a sampler that draws noise.
    """
    config = components.config
    frames = config.autoencoder.video_frames(like.shape[1])
    video = config.subject.read_video(frames, config.data.height_width).to(like.device)
    x0 = components.autoencoder.encode(rearrange(video, "f c h w -> 1 f c h w"), None).to(like.dtype)
    nothing = Pass(components.tokenize([components.model.text.null_prompt], [None]), None)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return nothing.predict(components, x, timestep, None)

    noise = invert(predict, components.objective, sampler, x0)
    return repeat(noise, "1 f c h w -> b f c h w", b=len(like))
