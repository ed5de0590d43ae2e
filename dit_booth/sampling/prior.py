"""Class images for prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): sampled by the base itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dit_booth.components import Components
from dit_booth.data.subject import caption_of, template_of
from dit_booth.models.weights import write
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks

log = logging.getLogger(__name__)

FOLDER = "prior"
CHUNK = 8
"""Class images that are sampled at once, and kept in one file."""
_SEED = 7_919_000_003  # of the noise: apart from that of the samples


def prior_images(components: Components, folder: Path, ranks: Ranks) -> Tensor | None:
    """Return `subject.prior` class images (n 1 3 h w in [-1, 1]), kept in the stage's folder as they are sampled.

    They are sampled without the strategies and without the rare token. An interrupted run goes on with those that are
    missing. None: the run has no prior preservation. ValueError: the base samples values that are not finite.
    """
    count = components.config.subject.prior
    if not count:
        return None
    chunks = [range(at, min(at + CHUNK, count)) for at in range(0, count, CHUNK)]
    files = [folder / FOLDER / f"{chunk.start:06d}.safetensors" for chunk in chunks]
    if ranks.first:
        log.info("class images of %s: %d", components.config.subject.word, count)
    problems: dict[int, str] = {}
    for number in range(ranks.rank, len(chunks), ranks.world):
        if not files[number].is_file():
            start = time.perf_counter()
            try:
                images = sample_class_images(components, chunks[number])
                write(files[number], {"images": images}, {"seconds": str(time.perf_counter() - start)})
            except ValueError as error:  # all ranks must stop, not one alone
                problems[number] = str(error)
                break
    if problems := ranks.gather(problems):  # and a barrier: now all files are there
        raise ValueError(problems[min(problems)])
    return torch.cat([load_file(file)["images"] for file in files]).float() / 127.5 - 1


def prior_seconds(folder: Path) -> float:
    """Return the seconds in which the class images of a stage's folder were sampled; 0 without any."""
    seconds = 0.0
    for file in sorted((folder / FOLDER).glob("*.safetensors")):
        with safe_open(file, "pt") as saved:
            seconds += float((saved.metadata() or {})["seconds"])
    return seconds


def sample_class_images(components: Components, numbers: Sequence[int]) -> Tensor:
    """Sample images of the class of `subject.word` (n 1 3 h w, bytes); each depends on its number alone.

    ValueError: values that are not finite.
    """
    config, active = components.config, components.model.active
    captions, side = config.subject.captions, config.data.prompt_side
    components.model.active = ()
    try:
        images = generate(
            components,
            torch.zeros(len(numbers), 3, side, side, device=components.device),
            [caption_of(template_of(captions, number), config.subject.word) for number in numbers],
            [None] * len(numbers),
            [_SEED + number for number in numbers],
            size=(1, *config.data.height_width),
            guidance=config.guidance,
            sampler=config.sampler,
            use_image=False,
        )
    finally:
        components.model.active = active
    if not torch.isfinite(images).all():
        raise ValueError(
            f"subject.prior: the base samples values that are not finite for {config.subject.word!r}; check weights,"
            " or set it to 0"
        )
    return ((images + 1) * 127.5).round().byte().cpu().contiguous()
