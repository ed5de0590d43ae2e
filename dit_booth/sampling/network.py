"""The network as samplers see it: guided, for a batch of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from einops import repeat
from torch import Tensor

from dit_booth.attention import Clip, FrameCache
from dit_booth.components import Components
from dit_booth.diffusion.clip_sampling import Known
from dit_booth.diffusion.guidance import Branch, GuidanceConfig
from dit_booth.diffusion.known_frames import frame_times
from dit_booth.diffusion.noise import randn
from dit_booth.inject import Condition, Reference, timestep_of_reference
from dit_booth.models.clip.encoders import Prompt


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

    def with_conditions_at(self, components: Components, timestep: Tensor, eps: Tensor | None) -> Pass:
        """Return a copy with all conditions made, of the reference at a timestep (b,): no later pass needs it."""
        if self.reference is None:
            return self
        timestep = self._by_branch(timestep)
        reference = self._noised(components, self.reference, timestep, eps)
        model = components.model
        names = [name for name in model.active if name not in self.constant]
        made = model.conditions(timestep, reference, names)
        return replace(self, reference=None, constant={**self.constant, **made})

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
        x, timestep = self._by_branch(x), self._by_branch(timestep)
        known = None if known is None else self._by_branch(known)
        reference = self.reference
        if reference is not None:
            reference = self._noised(components, reference, timestep_of_reference(timestep), eps)
        output: Tensor = components.model(
            x, timestep, self.prompt, reference, self.constant, known, clip
        ).output
        return output

    def _by_branch(self, x: Tensor) -> Tensor:
        """Repeat rows (b ...) for each branch."""
        return repeat(x, "b ... -> (r b) ...", r=len(self.prompt.ids) // len(x))

    def _noised(
        self, components: Components, reference: Reference, timestep: Tensor, eps: Tensor | None
    ) -> Reference:
        """Return the reference, noised to the timesteps of this pass's rows."""
        assert eps is not None
        t = components.objective.from_timestep(timestep)
        noisy = components.objective.noise(components.copies(reference), t, self._by_branch(eps))
        return replace(reference, noisy=noisy)


class Prompts(NamedTuple):
    """What videos are sampled of, a row each, and their size."""

    images: Tensor  # b 3 s s, or b r 3 s s, in [-1, 1]
    captions: Sequence[str]
    subjects: Sequence[str | None]
    size: tuple[int, int, int]  # latent frames, rows and columns


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
        dtype = components.model.dtype
        passes = make_passes(components, guidance, prompts, dtype, with_image)
        if reuse:
            passes = [one.with_constant_conditions(components) for one in passes]
        return cls(components, guidance, passes, draws, clip, dtype)

    def predict(
        self,
        x: Tensor,
        timestep: Tensor,
        known: Known | None = None,
        clip: Clip | None = None,
        caches: Sequence[FrameCache] = (),
    ) -> Tensor:
        """Predict at x (b f c h w), in which frames may be known; `timestep`, (b,) or (b f), is that of the others.

        clip: the frames of x in the video; none: x is the whole one, or a video of its own. caches: one for each pass.
        """
        shown = None
        if known is not None:
            timestep, shown = frame_times(timestep, known.timestep, known.mask), known.shown
        eps = self._noise_of_reference(x)
        if clip is None and x.shape[1] == len(self.clip.frames):
            clip = self.clip  # else, a warp's first frame, or a clip of its own
        clips = [clip] * len(self.passes)
        if caches:
            assert clip is not None, "a cache tells frames by their indices"
            clips = [replace(clip, cache=cache) for cache in caches]
        output = torch.cat(
            [
                one.predict(self.components, x, timestep, eps, shown, part)
                for one, part in zip(self.passes, clips, strict=True)
            ]
        )
        return self.guidance.combine(output.chunk(len(output) // len(x)))

    def at_timestep(self, timestep: float, like: Tensor) -> Self:
        """Return a copy whose reference stays at one timestep, with all conditions made; like: rows of latents."""
        t = torch.full((len(like),), timestep, device=like.device)
        eps = self._noise_of_reference(like)
        return replace(self, passes=[one.with_conditions_at(self.components, t, eps) for one in self.passes])

    def _noise_of_reference(self, like: Tensor) -> Tensor | None:
        """Draw the noise of the reference (b r c h w), if there is one."""
        first = self.passes[0].reference
        if first is None:
            return None
        shape = (len(like), *self.components.copies(first).shape[1:])
        return randn(shape, self.draws, like.device, like.dtype)


def make_passes(
    components: Components,
    guidance: GuidanceConfig,
    prompts: Prompts,
    dtype: torch.dtype,
    use_image: bool,
) -> list[Pass]:
    """Return the passes of every step; their rows are those of guidance's branches, in order.

    Without its text a branch has the null prompt (or ``guidance.negative``), without its image the zero image, as rows
    that training drops have; with ``guidance.unconditional=omit`` it has no image at all, hence a pass of its own.
    """
    images, captions, subjects, size = prompts
    null = guidance.negative or components.model.text.null_prompt

    def one(branches: Sequence[Branch], with_image: bool) -> Pass:
        words = [word for b in branches for word in (captions if b.text else [null] * len(images))]
        named = [name for b in branches for name in (subjects if b.text else [None] * len(images))]
        pictures = torch.cat([images if b.image else torch.zeros_like(images) for b in branches])
        words_of = components.tokenize(words, named)
        if not with_image:
            return Pass(words_of, None)
        reference = components.reference(pictures, dtype)
        return Pass(words_of, components.with_first_frame(reference, *size))

    branches = guidance.branches()
    if guidance.unconditional == "zero_image":
        return [one(branches, use_image)]
    groups = [[b for b in branches if b.image is image] for image in (True, False)]
    return [one(group, use_image and group[0].image) for group in groups if group]
