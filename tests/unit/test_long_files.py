"""Files of long videos, written while they are sampled: joined parts, Ctrl-C, resuming, tampering."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from long_trials import CHUNKS, KINDS, sampler_of
from torch import Tensor

from dit_booth.data.video import join_videos, probe, read_video, write_video
from dit_booth.sampling.generate import FrameSampler
from dit_booth.sampling.stream import write_while_sampling
from dit_booth.testing import Trial, trial

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def run() -> Trial:
    return trial(KINDS["chunks"][0]).perturb()


def test_joined_videos_have_the_frames_of_their_parts(tmp_path: Path) -> None:
    frames = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 10)):
        parts.append(tmp_path / f"{start}.mp4")
        write_video(parts[-1], frames[start:stop], fps=8, joinable=True)
    join_videos(tmp_path / "all.mp4", parts)
    assert probe(tmp_path / "all.mp4").frames == 10
    decoded = np.concatenate([read_video(part) for part in parts])
    assert np.array_equal(read_video(tmp_path / "all.mp4"), decoded)


class Interrupted:
    """A sampler's frames until Ctrl-C, after as many blocks."""

    def __init__(self, sampler: FrameSampler, blocks: int) -> None:
        self.sampler, self.left = sampler, blocks

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def __iter__(self) -> Iterator[Tensor]:
        for frames in self.sampler:
            if not self.left:
                signal.raise_signal(signal.SIGINT)
            self.left -= 1
            yield frames


def interrupt(path: Path, sampler: FrameSampler, blocks: int, key: str = "k") -> None:
    stopped: Any = Interrupted(sampler, blocks)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt, match="of 9 frames; the same command resumes"):
            write_while_sampling(path, stopped, fps=8, key=key)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_file_plays_and_resumes_to_the_same_video(run: Trial, tmp_path: Path) -> None:
    path, whole = tmp_path / "a.mp4", tmp_path / "whole.mp4"
    write_while_sampling(whole, sampler_of(run, CHUNKS), fps=8, key="k")
    interrupt(path, sampler_of(run, CHUNKS), 0)
    assert list(tmp_path.iterdir()) == [whole]
    interrupt(path, sampler_of(run, CHUNKS), 2)
    assert len(read_video(path)) == 6 and (tmp_path / "a.mp4.parts").is_dir()
    write_while_sampling(path, sampler_of(run, CHUNKS), fps=8, key="k")
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "whole.mp4"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("a.mp4.parts/00000.mp4", "00000.mp4 is not as it was written when sampling stopped"),
        ("a.mp4.parts/state.safetensors", "state.safetensors cannot be read"),
        ("a.mp4", "a.mp4 is not as it was written when sampling stopped"),
    ],
)
def test_a_file_that_was_tampered_with_is_one_error(
    file: str, message: str, run: Trial, tmp_path: Path
) -> None:
    sampler = sampler_of(run, CHUNKS)
    interrupt(tmp_path / "a.mp4", sampler, 1)
    with pytest.raises(ValueError, match="is of another video"):
        write_while_sampling(tmp_path / "a.mp4", sampler, fps=8, key="another")
    content = bytearray((tmp_path / file).read_bytes())
    content[len(content) // 2 if file.endswith("mp4") else 0] ^= 255
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_while_sampling(tmp_path / "a.mp4", sampler, fps=8, key="k")
