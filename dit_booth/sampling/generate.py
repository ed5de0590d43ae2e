"""From image prompts and captions to videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import repeat
from torch import Tensor

from dit_booth.components import Components
from dit_booth.diffusion.guidance import Branch
from dit_booth.diffusion.noise import randn
from dit_booth.diffusion.samplers import sample
from dit_booth.inject import Condition, Reference
from dit_booth.models.clip.encoders import NULL_PROMPT, Prompt


@torch.no_grad()
def generate(
    components: Components,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    seeds: Sequence[int],
    *,
    size: tuple[int, int, int],
    use_image: bool = True,
    reuse: bool = True,
) -> Tensor:
    """Sample one video per row: (b f 3 h w) in [-1, 1].

    images: (b 3 s s) in [-1, 1]; `size` is (frames, height, width) in pixels. A row's noise depends on its seed
    alone, so a video is the same in every batch. What strategies make of the image whatever the timestep serves all
    steps; with `reuse` false it is made at every step, which gives the same videos.
    """
    device, dtype = images.device, next(components.model.parameters()).dtype
    components.model.eval()
    frames, height, width = size
    factor, channels = components.autoencoder.factor, components.autoencoder.channels
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    batch, guidance = len(images), components.config.guidance
    passes = _passes(
        components, images, captions, subjects, dtype, use_image and bool(components.model.active)
    )
    if reuse:
        passes = [one.with_lasting(components) for one in passes]

    def model(x: Tensor, timestep: Tensor) -> Tensor:
        eps = None
        if (first := passes[0].reference) is not None:
            eps = randn((batch, *first.noisy.shape[1:]), draws, device, dtype)
        output = torch.cat([one.predict(components, x, timestep, eps) for one in passes])
        return guidance.combine(output.chunk(len(output) // batch))

    start = randn((batch, frames, channels, height // factor, width // factor), draws, device, dtype)
    latents = sample(model, components.objective, components.config.sampler, start, draws)
    return components.autoencoder.decode(latents).clamp(-1, 1)


@dataclass(frozen=True)
class Pass:
    """One pass through the network in a step: the rows of one or more branches of guidance."""

    prompt: Prompt
    reference: Reference | None
    known: Mapping[str, Condition] = field(default_factory=dict)

    def with_lasting(self, components: Components) -> Pass:
        """The same with the conditions that serve all steps."""
        return (
            self if self.reference is None else replace(self, known=components.model.lasting(self.reference))
        )

    def predict(self, components: Components, x: Tensor, timestep: Tensor, eps: Tensor | None) -> Tensor:
        """The network's prediction for its rows: those of x (b f c h w), once for each branch."""
        rows, reference = len(self.prompt.ids) // len(x), self.reference
        x, timestep = (repeat(y, "b ... -> (r b) ...", r=rows) for y in (x, timestep))
        if reference is not None:
            assert eps is not None
            eps = repeat(eps, "b ... -> (r b) ...", r=rows)
            noisy = components.objective.noise(
                reference.noisy, components.objective.from_timestep(timestep), eps
            )
            reference = replace(reference, noisy=noisy)
        output: Tensor = components.model(x, timestep, self.prompt, reference, self.known).output
        return output


def _passes(
    components: Components,
    images: Tensor,
    captions: Sequence[str],
    subjects: Sequence[str | None],
    dtype: torch.dtype,
    use_image: bool,
) -> list[Pass]:
    """The passes of every step; their rows are those of guidance's branches, in order.

    Without its text a branch has the null prompt, without its image the zero image, as rows that training drops have;
    with ``guidance.unconditional=omit`` it has no image at all, hence a pass of its own.
    """
    guidance = components.config.guidance

    def one(branches: Sequence[Branch], with_image: bool) -> Pass:
        words = [word for b in branches for word in (captions if b.text else [NULL_PROMPT] * len(images))]
        named = [name for b in branches for name in (subjects if b.text else [None] * len(images))]
        pictures = torch.cat([images if b.image else torch.zeros_like(images) for b in branches])
        return Pass(
            components.tokenize(words, named), components.reference(pictures, dtype) if with_image else None
        )

    branches = guidance.branches()
    if guidance.unconditional == "zero_image":
        return [one(branches, use_image)]
    groups = [[b for b in branches if b.image is image] for image in (True, False)]
    return [one(group, use_image and group[0].image) for group in groups if group]
