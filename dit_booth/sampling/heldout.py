"""Sample a run's held-out image prompts, and measure the videos."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import save_image

from dit_booth.components import Components
from dit_booth.config import SampleConfig
from dit_booth.data.example import Example
from dit_booth.data.video import write_video
from dit_booth.evaluation import evaluate, summary
from dit_booth.files import replacing, write_text
from dit_booth.sampling.contact_sheet import SheetRow, contact_sheet
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks

log = logging.getLogger(__name__)

Means = dict[str, dict[str, float]]
"""Metric -> mean, stderr, n."""


@dataclass(frozen=True)
class HeldoutSample:
    """A held-out example, the image prompt that its video was given, and the video (f 3 h w in [-1, 1])."""

    example: Example
    image: Tensor
    video: Tensor


def sample_heldout(
    components: Components, sample: SampleConfig, out: Path, ranks: Ranks
) -> list[HeldoutSample]:
    """Sample the held-out image prompts into `out`, shared over the ranks; return all videos on every rank."""
    config, dataset = components.config, components.dataset(heldout=True)
    count = min(sample.videos, len(dataset))
    examples = [dataset[i] for i in range(count)]
    shift = int(sample.reference == "shuffled")
    given = [examples[(i + shift) % count].image for i in range(count)]
    mine: list[tuple[int, Tensor]] = []
    own = list(range(ranks.rank, count, ranks.world))
    for at in range(0, len(own), sample.batch_size):
        rows = own[at : at + sample.batch_size]
        videos = generate(
            components,
            torch.stack([given[i] for i in rows]).to(ranks.device),
            [examples[i].caption for i in rows],
            [examples[i].subject for i in rows],
            [(sample.seed * 1_000_003 + i) % 2**63 for i in rows],
            size=(config.data.frames, *examples[rows[0]].video.shape[-2:]),
            guidance=config.guidance,
            sampler=config.sampler,
            use_image=sample.reference != "none",
        )
        for i, video in zip(rows, videos.float().cpu(), strict=True):
            write_video(out / f"{i:03d}.mp4", video, fps=sample.fps)
            mine.append((i, video))
        log.info("sampled %d of %d videos", min(at + len(rows), len(own)), len(own))
    gathered: list[list[tuple[int, Tensor]]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(gathered, mine)
    videos_by_index = dict(pair for pairs in gathered for pair in pairs)
    return [HeldoutSample(examples[i], given[i], videos_by_index[i]) for i in range(count)]


def measure(components: Components, samples: Sequence[HeldoutSample], out: Path) -> Means:
    """Score videos against their own image prompts (not the given ones), write files into `out`; return means."""
    device = next(components.image_encoder.parameters()).device
    text = components.model.text
    shapes = [s.example.identity["shape"] for s in samples if s.example.identity]  # the toy world's
    with torch.no_grad():
        scores = evaluate(
            [s.video for s in samples],
            [s.example.video for s in samples],
            [s.example.image for s in samples],
            [s.example.caption for s in samples],
            shapes=shapes or None,
            image_features=lambda images: components.image_encoder(images.to(device)).embedding,
            text_features=lambda captions: text(text.tokenize(list(captions))).pooled,
        )
    lines = [
        {"key": s.example.key, "caption": s.example.caption, **score}
        for s, score in zip(samples, scores, strict=True)
    ]
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_references(samples, out, components.config.sample.fps)
    rows = [
        SheetRow(image=s.image, truth=s.example.video, generated=s.video, caption=s.example.caption)
        for s in samples[:12]
    ]
    contact_sheet(rows, out / "contact_sheet.png")
    means = {name: asdict(statistic) for name, statistic in summary(scores).items()}
    for name, statistic in means.items():
        log.info("  %-18s %8.3f +- %.3f  (%d videos)", name, *statistic.values())
    return means


def write_references(samples: Sequence[HeldoutSample], out: Path, fps: int) -> None:
    """Write what each video is compared with, for the report: ``prompt/000.png`` and ``truth/000.mp4``."""
    for number, s in enumerate(samples):
        with replacing(out / "prompt" / f"{number:03d}.png") as partial:
            save_image((s.image.float() + 1) / 2, partial, format="PNG")
        write_video(out / "truth" / f"{number:03d}.mp4", s.example.video, fps=fps)
