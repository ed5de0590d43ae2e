"""The optimizer of a stage: AdamW, with a weight decay for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from dit_booth.config import PlainDict, TrainConfig
from dit_booth.errors import suggest


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], train: TrainConfig, lr: float
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter, arXiv 1711.05101) over named parameters; fused where possible.

    ValueError: a glob of `train.decay_of` that matches none of them.
    """
    return torch.optim.AdamW(
        decay_groups(parameters, train), lr=lr, betas=train.betas, fused=has_fused(list(parameters.values()))
    )


def decay_groups(parameters: Mapping[str, nn.Parameter], train: TrainConfig) -> list[PlainDict]:
    """Return one group of parameters for each weight decay, in the order in which they first occur."""
    rules = [rule.rpartition("=") for rule in train.decay_of]
    for glob, _, _ in rules:
        if not any(fnmatchcase(name, glob) for name in parameters):
            raise ValueError(
                f"train.decay_of has {glob!r}, which matches none of the {len(parameters)} trained"
                f" parameters{suggest(glob, parameters)}"
            )
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found = [float(decay) for glob, _, decay in rules if fnmatchcase(name, glob)]
        groups.setdefault(found[-1] if found else train.weight_decay, []).append(parameter)
    return [{"params": group, "weight_decay": decay} for decay, group in groups.items()]


def has_fused(parameters: list[nn.Parameter]) -> bool:
    """Return True if PyTorch's fused AdamW takes the parameters: floating point, on CUDA or the CPU."""
    return all(p.is_floating_point() and p.device.type in ("cuda", "cpu") for p in parameters)
