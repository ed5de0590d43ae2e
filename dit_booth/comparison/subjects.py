"""Subjects to compare on: the first prompts of a split, with the files that per-subject systems are tuned on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dit_booth.config import DataConfig, SubjectConfig
from dit_booth.data.example import Example
from dit_booth.data.toyworld import another_scene, caption, render_video
from dit_booth.data.video import write_video
from dit_booth.files import replacing
from dit_booth.sampling.prompts import Request


@dataclass(frozen=True)
class Subject:
    """A subject: its request (image, text and truth), its image as a file, and a video of it in another scene.

    `scene` is that video's text, with {} for the subject; both are empty where the data have no other scene.
    """

    index: int
    request: Request
    image: Path
    video: str = ""
    scene: str = ""

    def settings(self, shared: SubjectConfig) -> SubjectConfig:
        """Return the settings of the subject's stage. ValueError: the system tunes on a video, and there is none."""
        own = replace(shared, image=str(self.image), word=self.request.subject, mask="", prompts=())
        if shared.tune_on == "image":
            return own
        if not self.video:
            raise ValueError(
                f"subject {self.request.prompt} has no video of another scene, on which the system tunes; leave the"
                " systems that tune on videos out of --methods"
            )
        return replace(own, video=self.video, captions=(self.scene,))


def read_subjects(data: DataConfig, name: Literal["dev", "test"], count: int, folder: Path) -> list[Subject]:
    """Return the first `count` subjects of a split; their files lie in `folder`, written if they are missing.

    ValueError: the split has fewer.
    """
    split = data.build(name)
    if count > len(split):
        raise ValueError(f"--subjects is {count}, and the {name} split has {len(split)}; lower it")
    return [_subject(split[index], index, data, folder / f"{index:03d}") for index in range(count)]


def _subject(example: Example, index: int, data: DataConfig, folder: Path) -> Subject:
    request, image = Request.of(example), folder / "image.png"
    if not image.is_file():
        _write_image(image, example.image)
    if example.identity is None:
        return Subject(index, request, image)
    other = another_scene(example.identity)
    words = caption(other, colours=False, texture=False)  # a star is moving left on grass
    video = folder / "video.mp4"
    if not video.is_file():
        frames, _ = render_video(other, frames=data.frames, size=data.side)
        write_video(video, frames, fps=8, lossless=True)
    return Subject(index, request, image, str(video), "{}" + words.split(other.shape, 1)[1])


def _write_image(file: Path, image: Tensor) -> None:
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    with replacing(file) as partial:
        Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()).save(partial, format="PNG")
