"""Sample videos for the prompts of a run's data: its own method, and the floors beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path

import torch
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import SampleConfig, SampleReference
from dit_booth.data.example import Example, IdentityDict
from dit_booth.data.subject import caption_of
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case, Control
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks

log = logging.getLogger(__name__)

CONTROLS: dict[SampleReference, Control] = {"own": "", "shuffled": "shuffled", "none": "none"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample a video of, and what it is scored against where that is known (see `Case`)."""

    prompt: str
    caption: str
    subject: str
    image: Tensor
    truth: Tensor | None = None
    identity: IdentityDict | None = None
    frames: int = 0
    """Frames of the video; 0: as many as the run's data have."""
    further: tuple[Tensor, ...] = ()

    @property
    def images(self) -> Tensor:
        """All image prompts, `r 3 s s`."""
        return torch.stack([self.image, *self.further])

    @classmethod
    def of(cls, example: Example, frames: int = 0) -> Request:
        return cls(
            prompt=example.key,
            caption=example.caption,
            subject=example.subject,
            image=example.image,
            truth=example.video,
            identity=example.identity,
            frames=frames,
            further=example.further,
        )


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


def requests_of(components: Components, sample: SampleConfig, frames: int = 0) -> list[Request]:
    """Return a run's requests: the prompts of its one subject, if it names some, else those of `sample.split`.

    frames: of the videos, and of the real ones that they are compared with; 0: as the run's data.
    """
    subject, data = components.config.subject, components.config.data
    if not subject.prompts:
        dataset = components.dataset(sample.split, frames)
        return [Request.of(dataset[i], frames) for i in range(min(sample.videos, len(dataset)))]
    image = subject.read_image(data.prompt_side)
    captions = [caption_of(prompt, subject.word) for prompt in subject.prompts[: sample.videos]]
    return [Request(prompt=c, caption=c, subject=subject.word, image=image, frames=frames) for c in captions]


def sample_prompts(
    components: Components,
    sample: SampleConfig,
    requests: Sequence[Request],
    out: Path,
    ranks: Ranks,
    only: Sequence[int] | None = None,
) -> dict[str, Case]:
    """Sample videos of `requests` into `out`, shared over the ranks; return all of them by file name.

    only: indices of the requests to sample; names and noise are those that they have among all.

    Each request gets a video for every noise seed and every reference: its own image prompt, that of the next request
    (shuffled), or none. ValueError: shuffled, with a single request.
    """
    if "shuffled" in sample.references and len(requests) == 1:
        raise ValueError("sample.references has shuffled, and there is one prompt; raise sample.videos to 2")
    chosen = range(len(requests)) if only is None else only
    tasks = [_Task(*task) for task in product(sample.references, sample.seeds, chosen)]
    mine: dict[int, Tensor] = {}
    own = list(range(ranks.rank, len(tasks), ranks.world))
    for reference, numbers in groupby(own, lambda number: tasks[number].reference):
        same = list(numbers)
        for at in range(0, len(same), sample.batch_size):
            rows = same[at : at + sample.batch_size]
            videos = _generate(components, requests, [tasks[row] for row in rows], reference)
            for row, video in zip(rows, videos, strict=True):
                write_video(out / tasks[row].name, video, fps=sample.fps)
                mine[row] = video
            log.info("sampled %d of %d videos", len(mine), len(own))
    videos_by_task = ranks.gather(mine)
    return {task.name: _case(requests, task, videos_by_task[number]) for number, task in enumerate(tasks)}


def _given(requests: Sequence[Request], task: _Task) -> Tensor:
    """Return the image prompts (r 3 s s) that a video is made from."""
    shift = int(task.reference == "shuffled")
    return requests[(task.index + shift) % len(requests)].images


def _generate(
    components: Components, requests: Sequence[Request], tasks: Sequence[_Task], reference: SampleReference
) -> Tensor:
    config, first = components.config, requests[tasks[0].index]
    truth = first.truth
    size = config.data.height_width if truth is None else truth.shape[-2:]
    videos = generate(
        components,
        torch.stack([_given(requests, task) for task in tasks]).to(components.device),
        [requests[task.index].caption for task in tasks],
        [requests[task.index].subject or None for task in tasks],
        [task.seed for task in tasks],
        size=(first.frames or config.data.frames, *size),
        guidance=config.guidance,
        sampler=config.sampler,
        start=config.start,
        long=config.sample.long,
        use_image=reference != "none",
    )
    return videos.float().cpu()


def _case(requests: Sequence[Request], task: _Task, video: Tensor) -> Case:
    """Return what a video is scored against: its own prompt, whatever image it was given."""
    request = requests[task.index]
    return Case(
        video=video,
        image=request.image,
        caption=request.caption,
        subject=request.subject,
        prompt=request.prompt,
        truth=request.truth,
        identity=request.identity,
        noise_seed=task.noise_seed,
        control=CONTROLS[task.reference],
        given=_given(requests, task)[0],
    )
