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
from dit_booth.data.example import VideoDataset
from dit_booth.data.image_prompt import shows_subject
from dit_booth.data.readers.triplets import Triplets
from dit_booth.data.subject import template_from
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
        """Return the settings of the subject's stage.

        ValueError: the system tunes on a video, and there is none; the image shows nothing, or has no word.
        """
        if not (self.request.subject and shows_subject(self.request.image[None])):
            lacks = "is all white" if self.request.subject else "has no subject in words"
            raise ValueError(
                f"the image prompt of {self.request.prompt} {lacks}, which systems that are optimized per subject need;"
                " leave the example out of the data (data.triplets.test_csv), or those systems out of --methods"
            )
        own = replace(shared, image=str(self.image), word=self.request.subject, mask="", prompts=())
        if shared.tune_on == "image":
            return own
        if not self.video:
            raise ValueError(
                f"subject {self.request.prompt} has no second video, on which the system tunes; leave the systems that"
                " tune on videos out of --methods"
            )
        return replace(own, video=self.video, captions=(self.scene,))


def read_subjects(data: DataConfig, name: Literal["dev", "test"], count: int, folder: Path) -> list[Subject]:
    """Return the first `count` subjects of a split; their files lie in `folder`, written if they are missing.

    ValueError: the split has fewer.
    """
    split = data.build(name)
    if count > len(split):
        raise ValueError(f"--subjects is {count}, and the {name} split has {len(split)}; lower it")
    return [_subject(split, index, folder / f"{index:03d}") for index in range(count)]


def _subject(split: VideoDataset, index: int, folder: Path) -> Subject:
    request, image, video = Request.of(split[index]), folder / "image.png", folder / "video.mp4"
    if not image.is_file():
        _write_image(image, request.image)
    other = _another_video(split, index)
    if other is None:
        return Subject(index, request, image)
    if not video.is_file():
        write_video(video, other[0], fps=8, lossless=True)
    return Subject(index, request, image, str(video), other[1])


def _another_video(split: VideoDataset, index: int) -> tuple[Tensor, str] | None:
    """Return a video of the subject (f 3 h w), other than the real one of its prompt, and its text with {}."""
    if isinstance(split, Triplets):
        return split.another_clip(index)
    example = split[index]
    assert example.identity is not None, f"{example.key}: the toy world's subjects have identities"
    other = another_scene(example.identity)
    frames, _ = render_video(other, frames=len(example.video), size=example.video.shape[-1])
    words = caption(other, colours=False, texture=False)  # a star is moving left on grass
    return frames, template_from(words, other.shape)


def _write_image(file: Path, image: Tensor) -> None:
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    with replacing(file) as partial:
        Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()).save(partial, format="PNG")
