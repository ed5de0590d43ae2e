"""Weights of VideoBooth (U-Net and mapper) and ELITE (mapper) under their official names and ours: pure maps.

The backbone's names are upstream's already. VideoBooth registers each injected projection twice: in the U-Net's tree
(``...attn1.to_k_new.weight``) and, in the file to load, in the mapper's tree under a flattened name
(``..._attn1_to_k_new.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

MAPPER = "token_replacement.mapper."
TAPS = {  # name of a tap's layer: (its strategy, its suffix in the mapper's file)
    "to_k_global": ("token_replacement", "to_k"),
    "to_v_global": ("token_replacement", "to_v"),
    "to_k_exemplar": ("kv_concat", "to_k_exemplar"),
    "to_v_exemplar": ("kv_concat", "to_v_exemplar"),
    "to_k_new": ("kv_concat", "to_k_new"),
    "to_v_new": ("kv_concat", "to_v_new"),
}
_FLAT_TAPS = {("attn2" if "global" in tap else "attn1", flat): tap for tap, (_, flat) in TAPS.items()}
_FLAT = re.compile(
    r"(?:(down|up)_blocks_(\d+)|(mid_block))_attentions_(\d+)_transformer_blocks_(\d+)_(attn\d)_(\w+)\.weight"
)


class SplitWeights(NamedTuple):
    """Tensors of the backbone, and of strategies under ``<strategy>.taps.<site>.<tap>.weight`` and the like."""

    backbone: dict[str, Tensor]
    strategy: dict[str, Tensor]


def from_videobooth(state: Mapping[str, Tensor]) -> SplitWeights:
    """Map VideoBooth's U-Net or mapper, or ELITE's mapper. Unknown names go to the backbone.

    ValueError: the file holds a tap twice.
    """
    split = SplitWeights({}, {})
    for name, tensor in state.items():
        ours = _strategy_name(name)
        if ours in split.strategy:
            raise ValueError(
                f"{name} is in the file twice, flattened and in the U-Net's tree; keep one of them"
            )
        split[ours is not None][ours or name] = tensor
    return split


def _strategy_name(name: str) -> str | None:
    """Return our name of a strategy's official tensor; None for the backbone's."""
    if name.startswith("mapping_"):
        return f"{MAPPER}{name}"
    if flat := _FLAT.fullmatch(name):
        side, level, mid, i, j, attention, suffix = flat.groups()
        tap = _FLAT_TAPS.get((attention, suffix))
        site = f"{mid or f'{side}_blocks.{level}'}.attentions.{i}.transformer_blocks.{j}.{attention}"
        return f"{TAPS[tap][0]}.taps.{site}.{tap}.weight" if tap else None
    tap = name.split(".")[-2] if name.count(".") else ""
    return f"{TAPS[tap][0]}.taps.{name}" if tap in TAPS else None


def to_videobooth(root: Mapping[str, Tensor], *, taps_in_unet: bool = False) -> dict[str, dict[str, Tensor]]:
    """Map a whole model's state dict back: ``{"ema_unet": U-Net, "ema": mapper}``, the keys of VideoBooth's two files.

    root: names as in ``Injected.state_dict`` (``backbone.``, ``strategy.``). taps_in_unet: repeat the taps in the
    U-Net's tree; a strict load into the released code's plain U-Net does not expect them there.
    ValueError: a strategy that VideoBooth does not have.
    """
    unet = {k.removeprefix("backbone."): v for k, v in root.items() if k.startswith("backbone.")}
    mapper = {}
    for name, tensor in root.items():
        ours = name.removeprefix("strategy.")
        if ours == name:
            continue
        official = ours.removeprefix(MAPPER)
        if official == ours:
            strategy, _, official = ours.partition(".taps.")
            site, _, tap = official.removesuffix(".weight").rpartition(".")
            if TAPS.get(tap, ("",))[0] != strategy:
                raise ValueError(f"{name} has no place in VideoBooth's files; export its two strategies only")
            if taps_in_unet:
                unet[official] = tensor
            official = f"{site.replace('.', '_')}_{TAPS[tap][1]}.weight"
        mapper[official] = tensor
    return {"ema_unet": unet, "ema": mapper}
