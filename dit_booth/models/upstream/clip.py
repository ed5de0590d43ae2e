"""CLIP's weights under transformers' names and open_clip's: pure maps, and a check of ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from dit_booth.models.weights import JsonObject

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
    """Map transformers' CLIPModel to open_clip's CLIP, or CLIPTextModel to our `TextEncoder` (without its projection).

    Names that are not CLIP's stay, for a strict load to list. The three projections of an attention are joined; the
    two output projections are transposed.
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
    return _fuse_qkv(out)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map open_clip's CLIP back to transformers' names, without ``position_ids``."""
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


def _fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the projections of queries, keys and values, as in open_clip's attention; an incomplete set stays."""
    out = dict(state)
    for name in state:
        found = _ATTENTION.fullmatch(name)
        if not found or found[2] != "q":
            continue
        parts = [f"{found[1]}{letter}_proj.{found[3]}" for letter in "qkv"]
        if all(part in state for part in parts):
            out[f"{found[1]}in_proj_{found[3]}"] = torch.cat([out.pop(part) for part in parts])
    return out


def find_clip_mismatches(settings: JsonObject, transformer: nn.Module) -> list[str]:
    """Return one line per mismatch between a tower's ``config.json`` and open_clip's `transformer`.

    Compares what shows in no tensor's shape: heads, activation, epsilon.
    """
    block = transformer.get_submodule("resblocks.0")
    activation = type(block.get_submodule("mlp.gelu")).__name__
    here = {
        "num_attention_heads": block.get_submodule("attn").num_heads,
        "hidden_act": "quick_gelu" if activation == "QuickGELU" else "gelu",
        "layer_norm_eps": block.get_submodule("ln_1").eps,
    }
    given = {"hidden_act": "quick_gelu", **settings}
    return [
        f"{name} is {given[name]}, clip.model has {value}"
        for name, value in here.items()
        if given.get(name, value) != value
    ]
