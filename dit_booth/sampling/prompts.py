"""Sample videos for the prompts of a run's data: its own method, and the floors beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import SampleConfig, SampleReference
from dit_booth.data.example import Example
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case, Control
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks

log = logging.getLogger(__name__)

CONTROLS: dict[SampleReference, Control] = {"own": "", "shuffled": "shuffled", "none": "none"}


@dataclass(frozen=True)
class _Task:
    """A video to sample: the prompt's index, the image prompt that it gets, and the seed of its noise."""

    reference: SampleReference
    noise_seed: int
    index: int

    @property
    def name(self) -> str:
        control = CONTROLS[self.reference]
        return f"{self.index:03d}-seed{self.noise_seed}{f'-{control}' if control else ''}.mp4"

    @property
    def seed(self) -> int:
        return (self.noise_seed * 1_000_003 + self.index) % 2**63


def sample_prompts(components: Components, sample: SampleConfig, out: Path, ranks: Ranks) -> dict[str, Case]:
    """Sample the prompts of `sample.split` into `out`, shared over the ranks; return all videos by file name.

    Each prompt gets a video for every noise seed and every reference: its own image prompt, that of the next prompt
    (shuffled), or none. ValueError: shuffled, with a single prompt.
    """
    dataset = components.dataset(sample.split)
    examples = [dataset[i] for i in range(min(sample.videos, len(dataset)))]
    if "shuffled" in sample.references and len(examples) == 1:
        raise ValueError("sample.references has shuffled, and there is one prompt; raise sample.videos to 2")
    tasks = [_Task(*task) for task in product(sample.references, sample.seeds, range(len(examples)))]
    mine: list[tuple[int, Tensor]] = []
    own = list(range(ranks.rank, len(tasks), ranks.world))
    for reference, numbers in groupby(own, lambda number: tasks[number].reference):
        same = list(numbers)
        for at in range(0, len(same), sample.batch_size):
            rows = same[at : at + sample.batch_size]
            videos = _generate(components, examples, [tasks[row] for row in rows], reference)
            for row, video in zip(rows, videos, strict=True):
                write_video(out / tasks[row].name, video, fps=sample.fps)
                mine.append((row, video))
            log.info("sampled %d of %d videos", len(mine), len(own))
    gathered: list[list[tuple[int, Tensor]]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(gathered, mine)
    found = dict(pair for pairs in gathered for pair in pairs)
    return {task.name: _case(examples, task, found[number]) for number, task in enumerate(tasks)}


def given_image(examples: Sequence[Example], task: _Task) -> Tensor:
    """Return the image prompt that a video is made from."""
    shift = int(task.reference == "shuffled")
    return examples[(task.index + shift) % len(examples)].image


def _generate(
    components: Components, examples: Sequence[Example], tasks: Sequence[_Task], reference: SampleReference
) -> Tensor:
    config = components.config
    first = examples[tasks[0].index]
    return (
        generate(
            components,
            torch.stack([given_image(examples, task) for task in tasks]).to(components.device),
            [examples[task.index].caption for task in tasks],
            [examples[task.index].subject for task in tasks],
            [task.seed for task in tasks],
            size=(config.data.frames, *first.video.shape[-2:]),
            guidance=config.guidance,
            sampler=config.sampler,
            use_image=reference != "none",
        )
        .float()
        .cpu()
    )


def _case(examples: Sequence[Example], task: _Task, video: Tensor) -> Case:
    """Return what a video is scored against: its own prompt, whatever image it was given."""
    example = examples[task.index]
    return Case(
        video=video,
        image=example.image,
        caption=example.caption,
        subject=example.subject,
        prompt=example.key,
        truth=example.video,
        identity=example.identity,
        noise_seed=task.noise_seed,
        control=CONTROLS[task.reference],
        given=given_image(examples, task),
    )
