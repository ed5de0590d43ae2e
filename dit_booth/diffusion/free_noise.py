"""Noise of a long video from that of its first window (FreeNoise, arXiv 2310.15169, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_booth.diffusion.noise import Generators, per_row


def source_frames(frames: int, window: int, permutations: list[Tensor]) -> Tensor:
    """Return the frame of the drawn noise that each frame of the video gets: `f`, int64.

    permutations: for each step, which frames the next ones copy, by their index. Step k follows frame
    ``window + k * stride`` and may copy what an earlier step has put there.
    """
    source, at = torch.arange(frames), window
    for permutation in permutations:
        source[at : at + len(permutation)] = source[permutation]
        at += len(permutation)
    return source


def draw_permutations(frames: int, window: int, stride: int, generator: torch.Generator) -> list[Tensor]:
    """Shuffle, step by step, the `stride` frames one window earlier; the last step has the frames that are left."""
    steps = []
    for at in range(window, frames, stride):
        count = min(stride, frames - at)
        steps.append(at - window + torch.randperm(count, generator=generator))
    return steps


def reschedule(noise: Tensor, window: int, stride: int, generator: Generators) -> Tensor:
    """Return noise (b f ...) whose frames after the first `window` are shuffled copies of those a window earlier.

    With a generator for each row, a row's shuffles do not depend on the rest of the batch.
    """
    frames = noise.shape[1]

    def draw(rows: int, one: torch.Generator) -> Tensor:
        source = source_frames(frames, window, draw_permutations(frames, window, stride, one))
        return source.expand(rows, -1)

    source = per_row(draw, len(noise), generator).to(noise.device)
    rows = torch.arange(len(noise), device=noise.device)
    return noise[rows[:, None], source]
