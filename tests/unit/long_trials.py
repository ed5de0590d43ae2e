"""Samplers of long videos by tiny networks."""

from __future__ import annotations

import torch

from dit_booth.config import LongConfig
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.diffusion.start import StartConfig
from dit_booth.sampling.generate import FrameSampler
from dit_booth.testing import Trial
from dit_booth.testing.tiny import SIZE

CHUNKS = LongConfig(kind="chunks", window=4, prefix=2)
QUEUE = LongConfig(kind="diffusion_forcing", window=4, prefix=2)
LVDM = LongConfig(kind="lvdm", interpolated=4)
KINDS = {"chunks": ("kv_concat", CHUNKS), "diffusion_forcing": ("kv_concat", QUEUE), "lvdm": ("lvdm", LVDM)}


def sampler_of(
    run: Trial,
    long: LongConfig,
    frames: int = 9,
    rows: slice = slice(0, 1),
    steps: int = 2,
    start: StartConfig = StartConfig(),  # noqa: B008 (frozen)
) -> FrameSampler:
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return FrameSampler.build(
        run.components,
        images[rows],
        ["a dog runs", "the red cat and a cat"][rows],
        ["dog", "cat"][rows],
        [3, 4][rows],
        size=(frames, SIZE, SIZE),
        guidance=GuidanceConfig(scale=2.0),
        sampler=SamplerConfig(steps=steps, eta=1.0),
        start=start,
        long=long,
    )
