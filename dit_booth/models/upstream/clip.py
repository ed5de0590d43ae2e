"""CLIP's weights under transformers' names and under open_clip's: pure maps, and what shows in no tensor's shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",  # their spelling
    "post_layernorm": "ln_post",
}
_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_ATTENTION = re.compile(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel -> open_clip's CLIP, or CLIPTextModel -> our `TextEncoder` (less its projection).

    Names that are not CLIP's stay as they are, for a strict load to list. The three projections of an attention become
    one; the two output projections are transposed.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ...: in older files
            continue
        if name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = rearrange(tensor, "e d -> d e")
        elif name.startswith("vision_model."):
            out[f"visual.{_ours(name.removeprefix('vision_model.'), _VISION)}"] = tensor
        else:
            out[_ours(name.removeprefix("text_model."), _TEXT)] = tensor
    return _fused(out)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `from_transformers`, without ``position_ids``."""
    transposed = {ours: theirs for theirs, ours in _TRANSPOSED.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in transposed:
            out[transposed[name]] = rearrange(tensor, "d e -> e d").contiguous()
            continue
        if name == "logit_scale":
            out[name] = tensor
            continue
        vision = name.startswith("visual.")
        theirs = _theirs(name.removeprefix("visual."), _VISION if vision else _TEXT)
        theirs = f"{'vision' if vision else 'text'}_model.{theirs}"
        if ".in_proj_" in theirs:
            parts = rearrange(tensor, "(three d) ... -> three d ...", three=3)
            for letter, part in zip("qkv", parts, strict=True):
                out[theirs.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        else:
            out[theirs] = tensor
    return out


def _ours(name: str, tower: Mapping[str, str]) -> str:
    if name.startswith("encoder.layers."):
        name = name.replace("encoder.layers.", "transformer.resblocks.", 1).replace(".self_attn.", ".attn.")
        tower = _LAYER
    for theirs, ours in tower.items():
        name = name.replace(theirs, ours)
    return name


def _theirs(name: str, tower: Mapping[str, str]) -> str:
    if name.startswith("transformer.resblocks."):
        name = name.replace("transformer.resblocks.", "encoder.layers.", 1).replace(".attn.", ".self_attn.")
        tower = _LAYER
    for theirs, ours in tower.items():
        name = name.replace(ours, theirs)
    return name


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries', keys' and values' projections in one, as open_clip's attention has them; an incomplete set stays."""
    out = dict(state)
    for name in state:
        found = _ATTENTION.fullmatch(name)
        if not found or found[2] != "q":
            continue
        parts = [f"{found[1]}{letter}_proj.{found[3]}" for letter in "qkv"]
        if all(part in state for part in parts):
            out[f"{found[1]}in_proj_{found[3]}"] = torch.cat([out.pop(part) for part in parts])
    return out


def unlike_transformers(settings: Mapping[str, Any], transformer: nn.Module) -> list[str]:
    """What of a tower's ``config.json`` is unlike open_clip's `transformer` and shows in no tensor's shape."""
    block: Any = transformer.get_submodule("resblocks.0")
    activation = "quick_gelu" if type(block.mlp.gelu).__name__ == "QuickGELU" else "gelu"
    here = {
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": block.ln_1.eps,
    }
    given = {"hidden_act": "quick_gelu", **settings}
    return [
        f"{name} is {given[name]}, clip.model has {value}"
        for name, value in here.items()
        if given.get(name, value) != value
    ]
