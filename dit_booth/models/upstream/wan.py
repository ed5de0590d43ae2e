"""Wan's folders: diffusers' and the original's names and settings, as those of `VideoWan`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from dit_booth.models.wan.config import SIZES, Size, WanConfig
from dit_booth.models.weights import JsonObject

T = TypeVar("T")

DIFFUSERS, ORIGINAL = "WanTransformer3DModel", "WanModel"
"""Values of ``_class_name`` in a folder's ``config.json``."""
FIXED_SETTINGS: JsonObject = {
    "freq_dim": 256,
    "eps": 1e-6,
    "qk_norm": "rms_norm_across_heads",
    "pos_embed_seq_len": None,
}
"""Entries of diffusers' ``config.json`` that `VideoWan` has no option for."""
DEFAULTS: JsonObject = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    **FIXED_SETTINGS,
}
"""Entries of diffusers' ``config.json`` where a file has none."""
_NEVER = "it cannot be loaded"
_EMBEDDERS = {
    "time_embedding.0": "time_embedder.linear_1",
    "time_embedding.2": "time_embedder.linear_2",
    "time_projection.1": "time_proj",
    "text_embedding.0": "text_embedder.linear_1",
    "text_embedding.2": "text_embedder.linear_2",
    "img_emb.proj.0": "image_embedder.norm1",
    "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2",
    "img_emb.proj.4": "image_embedder.norm2",
}
_LAYERS = {
    "head.head": "proj_out",
    "norm3": "norm2",  # the original names the text attention's norm last, diffusers in order
    "norm2": "norm3",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
    "head.modulation": "scale_shift_table",
    "modulation": "scale_shift_table",
}
_RENAMED = {**{old: f"condition_embedder.{new}" for old, new in _EMBEDDERS.items()}, **_LAYERS}
_OLD = re.compile(
    r"(?<![^.])(" + "|".join(sorted(map(re.escape, _RENAMED), key=len, reverse=True)) + r")(?![^.])"
)


# ---- names -------------------------------------------------------------------------------------------------


def from_original(state: Mapping[str, T]) -> dict[str, T]:
    """Map the original's names to diffusers' and ours; tensors stay as they are."""
    return {_OLD.sub(lambda found: _RENAMED[found[1]], name): tensor for name, tensor in state.items()}


def is_original_wan(names: Collection[str]) -> bool:
    """Return True for names of tensors as the original has them."""
    return "blocks.0.self_attn.q.weight" in names


# ---- settings ----------------------------------------------------------------------------------------------


def from_original_settings(settings: JsonObject, names: Collection[str]) -> JsonObject:
    """Return the original's ``config.json`` under diffusers' names. names: of its tensors, which tell of an image."""
    heads, image = settings.get("num_heads", 40), any(name.startswith("img_emb.") for name in names)
    hidden = settings.get("dim", 5120)
    return {
        "patch_size": settings.get("patch_size", [1, 2, 2]),
        "num_attention_heads": heads,
        "attention_head_dim": hidden // heads,
        "in_channels": settings.get("in_dim", 16),
        "out_channels": settings.get("out_dim", 16),
        "text_dim": settings.get("text_dim", 4096),
        "freq_dim": settings.get("freq_dim", 256),
        "ffn_dim": settings.get("ffn_dim", 13824),
        "num_layers": settings.get("num_layers", 40),
        "cross_attn_norm": settings.get("cross_attn_norm", True),
        "eps": settings.get("eps", 1e-6),
        "image_dim": 1280 if image else None,
        "added_kv_proj_dim": hidden if image else None,
    }


def find_wan_mismatches(
    settings: JsonObject, config: WanConfig, *, channels: int, text_dim: int
) -> list[str]:
    """Return one line per mismatch between diffusers' ``config.json`` and a network, each with its fix.

    channels: of the network's latents. text_dim: width of its text tokens.
    """
    given = {**DEFAULTS, **settings}
    heads = given["num_attention_heads"]
    shape = Size(given["num_layers"], heads * given["attention_head_dim"], heads, given["ffn_dim"])
    out = []
    if shape != config.shape:
        sizes = ", ".join(f"{name} {n}" for name, n in shape._asdict().items())
        ours = ", ".join(f"{name} {n}" for name, n in config.shape._asdict().items())
        out.append(f"the folder has {sizes}, the network {ours}: {_shape_fix(shape)}")
    wanted = {
        "cross_attn_norm": ("cross_attn_norm", given["cross_attn_norm"]),
        "image_dim": ("image_dim", given["image_dim"] or 0),
        "condition_channels": ("in_channels - out_channels", given["in_channels"] - given["out_channels"]),
    }
    time, *patch = given["patch_size"]
    if time == 1 and patch[0] == patch[1]:
        wanted["patch"] = ("patch_size[1:]", patch[0])
    else:
        out.append(f"patch_size is {given['patch_size']}, this network has one frame and a square: {_NEVER}")
    for field, (name, value) in wanted.items():
        ours = getattr(config, field)
        if value != ours:
            out.append(f"{name} is {value}, wan.{field} is {ours}: {_fix(field, value)}")
    if given["out_channels"] != channels:
        out.append(
            f"out_channels is {given['out_channels']}, the latents have {channels}: choose its autoencoder"
        )
    if given["text_dim"] != text_dim:
        out.append(
            f"text_dim is {given['text_dim']}, the text encoder's width {text_dim}: choose its text encoder"
        )
    fixed = {**FIXED_SETTINGS, "added_kv_proj_dim": shape.hidden if given["image_dim"] else None}
    out += [
        f"{name} is {given[name]!r}, this network has {value!r}: {_NEVER}"
        for name, value in fixed.items()
        if given[name] != value
    ]
    return out


def _shape_fix(shape: Size) -> str:
    names = [name for name, size in SIZES.items() if size == shape]
    if names:
        return f"set --wan.size {names[0]}"
    return "set " + " ".join(f"--wan.{name} {n}" for name, n in shape._asdict().items())


def _fix(field: str, value: object) -> str:
    if field != "image_dim":
        return f"set --wan.{field.replace('_', '-')} {value}"
    kind = (
        "image-to-video weights, which read image states"
        if value
        else "text-to-video weights, without image keys"
    )
    return f"these are {kind}; set --wan.image-dim {value}, or give the other kind's folder"
