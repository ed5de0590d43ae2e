"""Metadata of ``strategy.safetensors``: the base that a strategy was trained on, and a comparison with another."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dit_booth.strategy import Strategies

log = logging.getLogger(__name__)

SAMPLES = 256
"""Elements of a parameter that enter its digest."""


def fingerprint(backbone: nn.Module) -> dict[str, str]:
    """Return parameter name -> shape and digest of the values, such as ``128x64:5f0c1a2e``.

    The digest covers at most `SAMPLES` elements, evenly spaced.
    """
    return {
        name: f"{'x'.join(map(str, p.shape))}:{_digest(p.detach())}"
        for name, p in backbone.named_parameters()
    }


def _digest(x: Tensor) -> str:
    flat = x.flatten()
    sampled = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to("cpu", torch.float32)
    return hashlib.sha256(sampled.numpy().tobytes()).hexdigest()[:8]


def short(base: Mapping[str, str]) -> str:
    """Return twelve hex digits that identify a whole base."""
    return hashlib.sha256(json.dumps(dict(base), sort_keys=True).encode()).hexdigest()[:12]


def metadata(backbone: nn.Module, strategies: Strategies) -> dict[str, str]:
    """Build the metadata of ``strategy.safetensors``: strategies, their options, the base they were trained on."""
    base = fingerprint(backbone)
    options = {name: asdict(strategies.part(name).config) for name in strategies.names}
    return {
        "strategy": "+".join(strategies.names),
        "options": json.dumps(options),
        "base": short(base),
        "base_parameters": json.dumps(base),
    }


def differences(saved: Mapping[str, str], backbone: nn.Module, strategies: Strategies) -> list[str]:
    """Return one line per mismatch between a file's metadata and the model (empty if they match)."""
    out = _compare_bases(json.loads(saved.get("base_parameters", "{}")), fingerprint(backbone))
    options: dict[str, dict[str, object]] = json.loads(saved.get("options", "{}"))
    for name in set(options) & set(strategies.names):
        here = json.loads(json.dumps(asdict(strategies.part(name).config)))
        out += [
            f"{name}.{key} was {value!r}, here it is {here[key]!r}"
            for key, value in options[name].items()
            if key in here and here[key] != value
        ]
    return out


def _compare_bases(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    if not there or there == here:
        return []
    shapes, values = [], []
    for name in there.keys() & here.keys():
        shape, _, digest = there[name].partition(":")
        own_shape, _, own_digest = here[name].partition(":")
        if shape != own_shape:
            shapes.append(f"{name}: {shape} there, {own_shape} here")
        elif digest != own_digest:
            values.append(name)
    kinds = [
        ("are missing here", there.keys() - here.keys()),
        ("are new here", here.keys() - there.keys()),
        ("have another shape", shapes),
        ("have other values", values),
    ]
    listed = "; ".join(
        f"{len(names)} {kind} ({_abbreviate(sorted(names))})" for kind, names in kinds if names
    )
    return [
        f"it was trained on base {short(there)}, this is {short(here)}: of {len(there)} parameters {listed}"
    ]


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def warn_of_another_base(source: str | Path, backbone: nn.Module, strategies: Strategies) -> list[str]:
    """Log and return the mismatches between the metadata of a run folder or its file and this model.

    Files without metadata pass.
    """
    path = Path(source)
    file = path / "strategy.safetensors" if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        return []
    try:
        with safe_open(file, "pt") as saved:
            found: dict[str, str] = saved.metadata() or {}
    except SafetensorError:
        return []  # loading its tensors raises the error
    lines = differences(found, backbone, strategies)
    for line in lines:
        log.warning("%s: %s", file, line)
    return lines
