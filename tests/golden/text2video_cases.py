"""Text2Video-Zero: its attention, the motion of the latents of frame 0, and the noise that is added after it."""

from __future__ import annotations

from collections.abc import Iterator

import attention_cases
import torch
from cases import FLOAT32, CaseResult, Info, Tensors, cast, labelled, outputs, worst
from torch import Tensor

from dit_booth.diffusion.motion_warp import motion_field, renoise, warp
from dit_booth.diffusion.objectives import EpsObjective
from dit_booth.diffusion.schedule import DiscreteSchedule


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """The attentions; ``motion_field_X_Y_constant``, ``warp_hSIDE_X_Y[_antialias]`` and ``ddpm_forward``."""
    yield from attention_cases.cases(info, tensors)
    for name in sorted(outputs(tensors)):
        stored, kind = tensors[f"outputs.{name}"], name.partition("_")[0]
        if kind == "motion":
            yield CaseResult(name, worst(field_of(name, len(stored)).amin((-2, -1)), stored))
            yield CaseResult(f"{name} everywhere", worst(field_of(name, len(stored)).amax((-2, -1)), stored))
        elif kind == "warp":  # positions in float32, as the original's: the nearest latent is copied
            yield CaseResult(name, worst(warped(name, tensors), stored))
        elif name == "ddpm_forward":
            for dtype in (torch.float32, torch.float64):
                made = noised(cast(tensors, dtype))
                yield CaseResult(labelled(name, dtype), worst(made, stored), FLOAT32)


def numbers(name: str) -> list[float]:
    """The strengths in a name; ``m20`` is -20."""
    words = [word.replace("m", "-", 1) if word[:1] == "m" else word for word in name.split("_")]
    return [float(word) for word in words if word.lstrip("-").isdigit()]


def field_of(name: str, frames: int) -> Tensor:
    """The field of frames 1, 2, ..."""
    x, y = numbers(name)
    return motion_field(range(1, frames + 1), (x, y))


def warped(name: str, tensors: Tensors) -> Tensor:
    """Frame 0's upper left corner, of the side that the name says, once for each frame: (b c f h w)."""
    frames, side = tensors[f"outputs.{name}"].shape[2:4]
    assert f"_h{side}_" in name, f"{name} has latents of {side}"
    first = tensors["inputs.x_t0_frame0"][..., :side, :side].transpose(1, 2)
    field = field_of(name, frames)
    moved = warp(first.expand(-1, frames, -1, -1, -1), field, antialias=name.endswith("_antialias"))
    return moved.transpose(1, 2)


def noised(tensors: Tensors) -> Tensor:
    """The first frames of the first warp of that size; the original multiplies alphas[t0:t1]: x0 stands at t0 - 1."""
    objective = EpsObjective(DiscreteSchedule(1 - tensors["inputs.ddpm_alphas"].double()))
    eps, (t0, t1) = tensors["inputs.ddpm_eps"], tensors["inputs.ddpm_t0_tmax"]
    start = f"outputs.warp_h{eps.shape[-1]}_"
    name = min(k for k in tensors if k.startswith(start) and not k.endswith("_antialias"))
    x = tensors[name][:, :, : eps.shape[2]]
    return renoise(objective, x, t0.expand(len(x)) - 1, t1.expand(len(x)) - 1, eps)
