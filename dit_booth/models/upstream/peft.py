"""LoRA files of diffusers and PEFT: pure maps between their names and those of strategy `lora`.

A file holds ``<prefix>.<layer>.lora_A.weight`` (r c) and ``.lora_B.weight`` (d r). The scale of a change is alpha / r:
alpha stands in the metadata (`KEY`), in ``<prefix>.<layer>.alpha``, or is r.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_booth.models.upstream.stable_diffusion import is_video_only

KEY = "lora_adapter_metadata"
"""Name of the metadata entry under which diffusers writes PEFT's configuration."""
PREFIXES = {"unet": "unet", "dit": "transformer", "wan": "transformer"}
"""Backbone -> the component of a diffusers pipeline that it stands for."""
TAPS = "lora.taps."


class Change(NamedTuple):
    """A low-rank change of one layer: W + scale up down."""

    down: Tensor  # r c
    up: Tensor  # d r
    scale: float


class Lora(NamedTuple):
    """Strategy `lora`: its options, and its tensors under their names there."""

    rank: int
    alpha: float
    state: dict[str, Tensor]

    @property
    def layers(self) -> list[str]:
        """Return the paths of the layers that are changed."""
        names = [name.removeprefix(TAPS) for name in self.state if name.endswith(".down.weight")]
        return [_layer(name.removesuffix(".down.weight")) for name in names]


# ---- from the strategy to PEFT -----------------------------------------------------------------------------


def to_peft(lora: Lora, backbone: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and metadata, as diffusers' pipelines write them.

    Layers that only a video U-Net has are left out. ValueError: no layer is left.
    """
    prefix = PREFIXES[backbone]
    layers = [layer for layer in lora.layers if backbone != "unet" or not is_video_only(layer)]
    if not layers:
        raise ValueError("lora changes only layers that an image U-Net lacks: there is nothing to export")
    state = {
        f"{prefix}.{layer}.lora_{theirs}.weight": lora.state[f"{TAPS}{_tap(layer)}.{ours}.weight"]
        for layer in layers
        for theirs, ours in (("A", "down"), ("B", "up"))
    }
    config = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": layers}
    return state, {"format": "pt", KEY: json.dumps({f"{prefix}.{k}": v for k, v in config.items()})}


# ---- from PEFT to the strategy -----------------------------------------------------------------------------


def from_peft(state: Mapping[str, Tensor], metadata: Mapping[str, str], backbone: str, source: str) -> Lora:
    """Return the strategy of a file's tensors and metadata.

    The strategy has one rank and scale: if layers differ, lower ranks are filled up with zeros and the scales go into
    `up`. ValueError: the file holds something else than low-rank changes of this backbone's linear layers.
    """
    prefix = PREFIXES[backbone]
    config = _configuration(metadata, prefix, source)
    changes = _read_changes(_rename(state, backbone), config, f"{prefix}.", source)
    rank = max(len(change.down) for change in changes.values())
    kinds = {(len(change.down), change.scale) for change in changes.values()}
    if len(kinds) == 1:
        alpha = next(iter(kinds))[1] * rank
    else:
        alpha = float(rank)
        changes = {layer: _fill_up(change, rank) for layer, change in changes.items()}
    tensors = {
        f"{TAPS}{_tap(layer)}.{part}.weight": getattr(change, part)
        for layer, change in changes.items()
        for part in ("down", "up")
    }
    return Lora(rank, alpha, tensors)


def _configuration(metadata: Mapping[str, str], prefix: str, source: str) -> dict[str, Any]:
    """Return PEFT's configuration in a file's metadata, empty if there is none. ValueError: it is no JSON object."""
    try:
        found: dict[str, Any] = dict(json.loads(metadata.get(KEY, "{}")))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: {KEY} in its metadata is no JSON object ({error}); save it again"
        ) from error
    mine = {k.removeprefix(f"{prefix}."): v for k, v in found.items() if k.startswith(f"{prefix}.")}
    return mine or found


def _rename(state: Mapping[str, Tensor], backbone: str) -> dict[str, Tensor]:
    """Return diffusers' names for those of other tools, as far as diffusers converts them.

    These are kohya's for the U-Net (``lora_unet_*``), and those of Wan's original layers (``diffusion_model.*``).
    """
    copies = {name: tensor.clone() for name, tensor in state.items()}  # diffusers scales in place
    if backbone == "wan" and any(name.startswith(("diffusion_model.", "lora_unet_")) for name in state):
        from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

        converted: dict[str, Tensor] = WanLoraLoaderMixin.lora_state_dict(copies)
        return converted
    if backbone != "unet" or not any(name.startswith("lora_unet_") for name in state):
        return copies
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
    from diffusers.utils import state_dict_utils

    to_peft: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = (
        state_dict_utils.convert_unet_state_dict_to_peft
    )
    theirs, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(copies)
    scalars = {name.removesuffix(".alpha"): torch.tensor(float(y)) for name, y in (alphas or {}).items()}
    scalars = to_peft(scalars)
    alphas_of_layers = {f"{name.removesuffix('.lora_A.weight')}.alpha": y for name, y in scalars.items()}
    return {**to_peft(theirs), **alphas_of_layers}


def _read_changes(
    state: Mapping[str, Tensor], config: Mapping[str, Any], prefix: str, source: str
) -> dict[str, Change]:
    """Return layer -> change."""
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    downs = {name.removesuffix(".lora_A.weight") for name in mine if name.endswith(".lora_A.weight")}
    known = {f"{layer}.{part}" for layer in downs for part in ("lora_A.weight", "lora_B.weight", "alpha")}
    halves = [layer for layer in downs if f"{layer}.lora_B.weight" not in mine]
    unknown = sorted(mine.keys() - known)
    if not downs or halves or unknown or config.get("use_dora"):
        found = ", ".join((unknown or halves or sorted(state))[:3]) or "nothing"
        raise ValueError(
            f"{source} is no LoRA of {prefix[:-1]} layers (it has {found}); give one that diffusers or PEFT wrote,"
            f" with names such as {prefix}...to_q.lora_A.weight and .lora_B.weight, without DoRA and biases"
        )
    changes = {}
    for layer in sorted(downs):
        down, up = mine[f"{layer}.lora_A.weight"], mine[f"{layer}.lora_B.weight"]
        given = mine.get(f"{layer}.alpha")
        alpha = _alpha(layer, config, len(down)) if given is None else given.item()
        root = math.sqrt(len(down)) if config.get("use_rslora") else len(down)
        changes[layer] = Change(down.flatten(1), up.flatten(1), alpha / root)
    return changes


def _alpha(layer: str, config: Mapping[str, Any], rank: int) -> float:
    """Return a layer's alpha: by the first of PEFT's patterns that its path ends with, else the common one, else r.

    ``^`` before a pattern: it is the whole path. ValueError: a pattern is a regular expression otherwise.
    """
    for pattern, alpha in config.get("alpha_pattern", {}).items():
        name = pattern.removeprefix("^")
        if not re.fullmatch(r"[\w.]+", name):
            raise ValueError(
                f"alpha_pattern has {pattern!r} in {KEY}; only names of layers are read: save it with these"
            )
        if layer == name or (name == pattern and layer.endswith(f".{name}")):
            return float(alpha)
    return float(config.get("lora_alpha", rank))


def _fill_up(change: Change, rank: int) -> Change:
    """Return the same change with `rank` and a scale of 1."""
    missing = rank - len(change.down)
    return Change(F.pad(change.down, (0, 0, 0, missing)), F.pad(change.scale * change.up, (0, missing)), 1.0)


# ---- names -------------------------------------------------------------------------------------------------


def _tap(layer: str) -> str:
    return layer.replace(".to_", ".")


def _layer(tap: str) -> str:
    return re.sub(r"\.(q|k|v|out)(?=\.|$)", r".to_\1", tap)
