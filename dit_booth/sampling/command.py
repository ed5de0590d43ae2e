"""Sample videos from a finished run: its held-out image prompts again, or an image of your own.

python experiments/sample.py runs/RUN --reference shuffled --seeds 0 1 2
python experiments/sample.py runs/RUN --image path/to/image_or_folder --caption "a panda is running" --subject panda
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torchvision.utils import save_image

from dit_booth.components import Components, build
from dit_booth.config.parse import parse
from dit_booth.data.example import Example
from dit_booth.data.image_prompt import load_image_prompt
from dit_booth.data.video import write_video
from dit_booth.evaluation import evaluate, summary
from dit_booth.files import replacing, write_text
from dit_booth.models.fingerprint import warn_of_another_base
from dit_booth.models.weights import load_strictly, read
from dit_booth.sampling.contact_sheet import SheetRow, contact_sheet
from dit_booth.sampling.generate import generate
from dit_booth.training.distributed import Ranks, start, stop
from dit_booth.training.stage import active_strategies, schedule_of

log = logging.getLogger("dit_booth")


@dataclass(frozen=True)
class Row:
    """A held-out example, the image prompt that its video was given, and the video (f 3 h w in [-1, 1])."""

    example: Example
    image: Tensor
    video: Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    run: Annotated[str, tyro.conf.Positional]
    """The folder of a finished run."""
    reference: Literal["own", "shuffled", "none"] = "own"
    """The image prompt that a video gets: its own, the next one's (a control), or none."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the sampling noise, one set of videos each."""
    videos: int = 0
    """Held-out image prompts; 0: as many as the run sampled."""
    image: str = ""
    """An image, or a folder with image.jpg and a mask, to sample from instead of the held-out ones."""
    caption: str = ""
    """The text for --image."""
    subject: str = ""
    """The word of the caption that the image stands for."""
    set: tuple[str, ...] = ()
    """Settings of the run to sample with other values of, such as guidance.image=3 decoupled_attention.scale=0.5."""


def main(argv: Sequence[str]) -> int:
    """0: sampled; 1: an error, said in one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        sample_run(tyro.cli(Settings, args=argv, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def sample_run(settings: Settings) -> None:
    """ValueError: the run is not finished, or --image has no caption with its subject."""
    components = load_run(Path(settings.run), settings.set)
    other = "".join(f"-{setting}" for setting in settings.set)
    ranks = start()
    try:
        for seed in settings.seeds:
            sample = dataclasses.replace(
                components.config.sample,
                seed=seed,
                reference=settings.reference,
                videos=settings.videos or components.config.sample.videos,
            )
            components.config = dataclasses.replace(components.config, sample=sample)
            if settings.image:
                print(sample_own(components, settings, seed))
                continue
            out = Path(settings.run) / f"samples-{settings.reference}-seed{seed}{other}"
            means = measure(components, sample_heldout(components, out, ranks), out)
            print(json.dumps({"reference": settings.reference, "seed": seed, "folder": str(out), **means}))
    finally:
        stop()


def load_run(folder: Path, other: Sequence[str] = ()) -> Components:
    """The model of a finished run, its last stage's strategies active; `other` are settings that replace the run's."""
    if not (folder / "finished").is_file():
        raise ValueError(
            f"{folder} is not a finished run; run it to its end first (the same command resumes)"
        )
    config = parse(["--config", str(folder / "run.yaml"), *(f"--{setting}" for setting in other)])
    components = build(config)
    for name, prefix in (("weights", ""), ("strategy", "strategy.")):
        file = folder / f"{name}.safetensors"
        if file.is_file():
            load_strictly(
                components.model, {prefix + k: v for k, v in read(file).items()}, str(file), partial=True
            )
    warn_of_another_base(folder, components.model.backbone, components.model.strategy)
    schedule = schedule_of(config)
    if schedule:
        components.model.active = active_strategies(config, schedule, len(schedule) - 1)
    return components.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def sample_own(components: Components, settings: Settings, seed: int) -> Path:
    """One video of a user's image and caption, with a contact sheet; the video's path."""
    config = components.config
    side = config.data.image_size or config.data.size
    image = load_image_prompt(settings.image, size=side)
    device = next(components.model.parameters()).device
    video = generate(
        components,
        image[None].to(device),
        [settings.caption],
        [settings.subject or None],
        [seed],
        size=(config.data.frames, config.data.size, config.data.size),
        guidance=config.guidance,
        sampler=config.sampler,
        use_image=settings.reference != "none",
    )[0].float()
    other = "".join(f"-{setting}" for setting in settings.set)
    path = Path(settings.run) / "samples-own-image" / f"{Path(settings.image).stem}-seed{seed}{other}.mp4"
    write_video(path, video.cpu(), fps=config.sample.fps)
    sheet = SheetRow(image=image, generated=video.cpu(), caption=settings.caption)
    contact_sheet([sheet], path.with_suffix(".png"))
    return path


def sample_heldout(components: Components, out: Path, ranks: Ranks) -> list[Row]:
    """Sample the held-out image prompts into `out`, shared over the ranks; every rank gets all rows, in order."""
    config = components.config
    dataset = components.dataset(heldout=True)
    count = min(config.sample.videos, len(dataset))
    examples = [dataset[i] for i in range(count)]
    shift = int(config.sample.reference == "shuffled")
    given = [examples[(i + shift) % count].image for i in range(count)]
    mine: list[tuple[int, Tensor]] = []
    own = list(range(ranks.rank, count, ranks.world))
    for at in range(0, len(own), config.sample.batch_size):
        rows = own[at : at + config.sample.batch_size]
        videos = generate(
            components,
            torch.stack([given[i] for i in rows]).to(ranks.device),
            [examples[i].caption for i in rows],
            [examples[i].subject for i in rows],
            [config.sample.seed * 1_000_003 + i for i in rows],
            size=(config.data.frames, *examples[rows[0]].video.shape[-2:]),
            guidance=config.guidance,
            sampler=config.sampler,
            use_image=config.sample.reference != "none",
        )
        for i, video in zip(rows, videos.float().cpu(), strict=True):
            write_video(out / f"{i:03d}.mp4", video, fps=config.sample.fps)
            mine.append((i, video))
        log.info("sampled %d of %d videos", min(at + len(rows), len(own)), len(own))
    everyone: list[list[tuple[int, Tensor]]] = [[] for _ in range(ranks.world)]
    dist.all_gather_object(everyone, mine)
    videos_by_index = dict(row for rows in everyone for row in rows)
    return [Row(examples[i], given[i], videos_by_index[i]) for i in range(count)]


def measure(components: Components, rows: list[Row], out: Path) -> dict[str, dict[str, float]]:
    """Scores of videos against their own image prompts (not the given ones), as files in `out`; means over videos."""
    device = next(components.image_encoder.parameters()).device
    shapes = [row.example.identity["shape"] for row in rows if row.example.identity]  # the toy world's
    with torch.no_grad():
        scores = evaluate(
            [row.video for row in rows],
            [row.example.video for row in rows],
            [row.example.image for row in rows],
            [row.example.caption for row in rows],
            shapes=shapes or None,
            image_features=lambda images: components.image_encoder(images.to(device)).embedding,
            text_features=lambda captions: (
                components.model.text(components.model.text.tokenize(list(captions))).pooled
            ),
        )
    lines = [
        {"key": row.example.key, "caption": row.example.caption, **score}
        for row, score in zip(rows, scores, strict=True)
    ]
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_given(rows, out, components.config.sample.fps)
    contact_sheet(
        [
            SheetRow(
                image=row.image, truth=row.example.video, generated=row.video, caption=row.example.caption
            )
            for row in rows[:12]
        ],
        out / "contact_sheet.png",
    )
    means = {name: dataclasses.asdict(statistic) for name, statistic in summary(scores).items()}
    for name, statistic in means.items():
        log.info("  %-18s %8.3f +- %.3f  (%d videos)", name, *statistic.values())
    return means


def write_given(rows: list[Row], out: Path, fps: int) -> None:
    """What each video is to be compared with, for the report: ``prompt/000.png`` and ``truth/000.mp4``."""
    for number, row in enumerate(rows):
        with replacing(out / "prompt" / f"{number:03d}.png") as partial:
            save_image((row.image.float() + 1) / 2, partial, format="PNG")
        write_video(out / "truth" / f"{number:03d}.mp4", row.example.video, fps=fps)
