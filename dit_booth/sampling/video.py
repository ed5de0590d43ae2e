"""`Video`: the result of a pipeline."""

from __future__ import annotations

import base64
import html
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dit_booth.data.video import probe, read_video, write_gif, write_video
from dit_booth.sampling.contact_sheet import SheetRow, draw_contact_sheet


@dataclass(frozen=True, eq=False, kw_only=True)
class Video:
    """A sampled video, with its text and image prompts.

    Attributes:
        frames: `f h w 3`, uint8.
        fps: frames per second.
        text: the text prompt.
        image: `s s 3`, uint8, the image prompt as the networks saw it; None where there was none.
    """

    frames: NDArray[np.uint8]
    fps: int
    text: str = ""
    image: NDArray[np.uint8] | None = None

    @classmethod
    def from_tensor(cls, video: Tensor, *, fps: int, text: str = "", image: Tensor | None = None) -> Video:
        """Make a video of `f 3 h w` in [-1, 1], with its image prompt, `3 s s` in [-1, 1]."""
        frames = rearrange(_to_uint8(video), "f c h w -> f h w c")
        seen = None if image is None else rearrange(_to_uint8(image), "c h w -> h w c")
        return cls(frames=frames, fps=fps, text=text, image=seen)

    @classmethod
    def read(cls, path: str | Path, *, text: str = "", image: Tensor | None = None, stride: int = 1) -> Video:
        """Read every `stride`-th frame of a file, with the image prompt that it was made of, `3 s s` in [-1, 1]."""
        seen = None if image is None else rearrange(_to_uint8(image), "c h w -> h w c")
        fps = round(probe(path).fps)
        return cls(frames=read_video(path, stride=stride), fps=fps, text=text, image=seen)

    @property
    def tensor(self) -> Tensor:
        """Return the frames as `f 3 h w`, float32 in [-1, 1]."""
        return rearrange(_to_float(self.frames), "f h w c -> f c h w")

    def __len__(self) -> int:
        return len(self.frames)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {height} x {width}, {self.fps} fps, text={self.text!r})"

    def save(self, path: str | Path) -> Path:
        """Write the video as .mp4 or .gif, or its contact sheet as .png. ValueError: another suffix."""
        path = Path(path)
        if path.suffix == ".mp4":
            write_video(path, self.tensor, fps=self.fps)
        elif path.suffix == ".gif":
            write_gif(path, self.tensor, fps=self.fps)
        elif path.suffix == ".png":
            path.parent.mkdir(parents=True, exist_ok=True)
            self.contact_sheet().save(path)
        else:
            raise ValueError(
                f"path is {str(path)!r}; give it the suffix .mp4, .gif or .png (a contact sheet)"
            )
        return path

    def contact_sheet(self, columns: int = 8) -> Image.Image:
        """Draw the image prompt, at most `columns` evenly spaced frames and the text as one picture."""
        white = torch.ones(3, *self.frames.shape[1:3])
        image = white if self.image is None else rearrange(_to_float(self.image), "h w c -> c h w")
        return draw_contact_sheet(
            [SheetRow(image=image, generated=self.tensor, caption=self.text)], columns=columns
        )

    def _repr_html_(self) -> str:
        """Show the video in a notebook: an animated GIF, enlarged to at least 192 pixels."""
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder) / "video.gif").read_bytes()).decode()
        height = max(192, self.frames.shape[1])
        return (
            f'<img src="data:image/gif;base64,{data}" height="{height}" alt="{html.escape(self.text)}"'
            f' style="image-rendering: pixelated"><br>{html.escape(self.text)}'
        )


def _to_uint8(x: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = ((x.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return pixels


def _to_float(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1
