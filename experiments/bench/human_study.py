"""Human study: demo videos."""

from __future__ import annotations

from pathlib import Path

import torch

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.folder import write_videos


def write_demo(
    folder: Path, name: str, noise: float, *, prompts: int, size: int = 64, frames: int = 8
) -> Path:
    """Write a system's folder: the toy world's videos, with noise of its own."""
    world = Toyworld(ToyworldConfig(size=size, frames=frames, split="test"))
    cases = {}
    for index in range(prompts):
        example = world[index]
        random = torch.Generator().manual_seed(index)
        video = example.video + noise * torch.randn(example.video.shape, generator=random)
        file = f"{index:03d}.mp4"
        write_video(folder / name / file, video, fps=8)
        cases[file] = Case(
            video=video.clamp(-1, 1),
            image=example.image,
            caption=example.caption,
            subject=example.subject,
            prompt=example.key,
            truth=example.video,
        )
    write_videos(folder / name, cases, fps=8)
    return folder / name
