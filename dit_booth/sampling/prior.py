"""Class images for prior preservation (DreamBooth, arXiv 2208.12242, section 3.2): sampled by the base itself."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dit_booth.components import Components
from dit_booth.data.subject import caption_of
from dit_booth.models.weights import write
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks

log = logging.getLogger(__name__)

FILE = "prior.safetensors"
_SEED = 7_919_000_003  # of the noise: apart from that of the samples


def prior_images(components: Components, folder: Path, ranks: Ranks) -> Tensor | None:
    """Return `subject.prior` class images (n 1 3 h w in [-1, 1]), from the stage's folder once they are there.

    They are sampled without the strategies and without the rare token. None: the run has no prior preservation.
    ValueError: the base samples values that are not finite.
    """
    count = components.config.subject.prior
    if not count:
        return None
    file = folder / FILE
    if not ranks.broadcast(file.is_file()):
        mine = {index: _sample(components, index) for index in range(ranks.rank, count, ranks.world)}
        images = ranks.gather(mine)
        if ranks.first:
            log.info("sampled %d class images of %s", count, components.config.subject.word)
            pixels = torch.stack([images[index] for index in range(count)])
            write(file, {"images": ((pixels + 1) * 127.5).round().byte()})
        ranks.barrier()
    return load_file(file)["images"].float() / 127.5 - 1


def _sample(components: Components, index: int) -> Tensor:
    """Sample class image `index`: 1 3 h w."""
    config, active = components.config, components.model.active
    captions, size = config.subject.captions, config.data.size
    components.model.active = ()
    try:
        (image,) = generate(
            components,
            torch.zeros(1, 3, size, size, device=components.device),
            [caption_of(captions[index % len(captions)], config.subject.word)],
            [None],
            [_SEED + index],
            size=(1, size, size),
            guidance=config.guidance,
            sampler=config.sampler,
            use_image=False,
        )
    finally:
        components.model.active = active
    if not torch.isfinite(image).all():
        raise ValueError(
            f"subject.prior: the base samples values that are not finite for {config.subject.word!r}; check weights,"
            " or set it to 0"
        )
    return image.float().cpu()
