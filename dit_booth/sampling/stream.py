"""A video file that is written while its frames are sampled, and goes on after an interruption.

Until ``x.mp4`` is complete, the folder ``x.mp4.parts`` lies beside it: finished frames as videos of their own, and
``state.safetensors``: what sampling goes on from, with the hashes of those videos and of all settings. An interruption
joins what is there into ``x.mp4``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_booth.data.video import join_videos, write_video
from dit_booth.files import Lock, write_text
from dit_booth.models.weights import write
from dit_booth.sampling.generate import FrameSampler


def write_while_sampling(path: Path, frames: FrameSampler, *, fps: int, key: str) -> None:
    """Write the one video of a sampler as it is made, going on where an earlier call with the same `key` stopped.

    key: tells all that the video depends on. Memory does not grow with the video where the sampler's does not.
    ValueError: the path is not an .mp4 file; another video, or another process, has its folder of parts; a part or the
    interrupted file is not as it was written. KeyboardInterrupt: with a message; what is finished can be played.
    """
    if path.suffix != ".mp4":
        raise ValueError(f"path is {str(path)!r}; a video is written as an .mp4 file: give it that suffix")
    with _locked(Parts(path, key)) as parts:
        parts.resume(frames)
        try:
            for block in frames:
                parts.add(rearrange(block, "1 f c h w -> f c h w"), frames, fps)
        except BaseException as error:
            parts.join()
            if isinstance(error, KeyboardInterrupt):
                done = f"{path} has {frames.done} of {frames.frames} frames; the same command resumes"
                raise KeyboardInterrupt(f"stopped; {done}") from None
            raise
        parts.finish()


@contextmanager
def _locked(parts: Parts) -> Iterator[Parts]:
    """Hold the lock of a folder of parts."""
    lock = Lock(parts.folder)
    if not lock.take():
        raise ValueError(f"{parts.path} is being written by another process; wait, or choose another path")
    try:
        yield parts
    finally:
        lock.release()


class Parts:
    """The finished parts of a video, and the state after the last one."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.folder = path.with_name(f"{path.name}.parts")
        self.state_file, self.joined_file = self.folder / "state.safetensors", self.folder / "joined"
        self.hashes: list[str] = []

    def files(self) -> list[Path]:
        """Return the finished parts in order."""
        return [self.folder / f"{i:05}.mp4" for i in range(len(self.hashes))]

    def resume(self, frames: FrameSampler) -> None:
        """Restore the state after the last part, if there is one. ValueError: files are not as they were written."""
        if not self.state_file.is_file():
            return
        state, metadata = self._read_state()
        if metadata.get("key") != self.key:
            raise ValueError(
                f"{self.folder} is of another video (other settings, text or image); remove it, or choose another path"
            )
        self.hashes = json.loads(metadata["parts"])
        for part, written in zip(self.files(), self.hashes, strict=True):
            self._check(part, written)
        if self.joined_file.is_file() and self.path.is_file():
            self._check(self.path, self.joined_file.read_text())
        frames.restore(state)

    def _read_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(self.state_file, "pt") as saved:
                return {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{self.state_file} cannot be read ({error}); remove {self.folder} to begin anew"
            ) from error

    def _check(self, file: Path, written: str) -> None:
        if not file.is_file() or _hash(file) != written:
            raise ValueError(
                f"{file} is not as it was written when sampling stopped; restore it, or remove {self.folder} to begin"
                " anew"
            )

    def add(self, frames: Tensor, sampler: FrameSampler, fps: int) -> None:
        """Write the next frames (f 3 h w), then the state, by which they count."""
        part = self.folder / f"{len(self.hashes):05}.mp4"
        write_video(part, frames, fps=fps, joinable=True)
        hashes = [*self.hashes, _hash(part)]
        write(self.state_file, sampler.state(), {"key": self.key, "parts": json.dumps(hashes)})
        self.hashes = hashes

    def join(self) -> None:
        """Write the finished parts to the path, and the hash of what is there; without any, leave nothing."""
        if not self.hashes:
            shutil.rmtree(self.folder)
            return
        join_videos(self.path, self.files())
        write_text(self.joined_file, _hash(self.path))

    def finish(self) -> None:
        """Write the video to the path, and remove the parts."""
        join_videos(self.path, self.files())
        shutil.rmtree(self.folder)


def hash_of(settings: object, *tensors: Tensor | None) -> str:
    """Return a digest of settings, which JSON can hold, and tensors."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in tensors:
        digest.update(b"" if tensor is None else tensor.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
