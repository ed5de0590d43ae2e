"""Tensors under their official names and under ours: pure maps from state dict to state dict, and back.

Stable Diffusion 1.x's U-Net (diffusers), VideoBooth's U-Net and mapper, ELITE's mapper. The backbone's names are
upstream's already. What VideoBooth injects it registers twice: in the U-Net's tree (``...attn1.to_k_new.weight``),
and, which is the file to load, in the mapper's under a flattened name (``..._attn1_to_k_new.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dit_booth.models.unet.config import UNetConfig

MAPPER = "token_replacement.mapper."
TAPS = {  # a tap's own name: the strategy that owns it, its suffix in the mapper's file
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


class Split(NamedTuple):
    """A file's tensors: the backbone's, and the strategies' as ``<strategy>.taps.<site>.<tap>.weight`` and so on."""

    backbone: dict[str, Tensor]
    strategy: dict[str, Tensor]


# ---- VideoBooth, ELITE -----------------------------------------------------------------------------------------------


def from_videobooth(state: Mapping[str, Tensor]) -> Split:
    """Any file of VideoBooth's (U-Net or mapper), or ELITE's mapper. A name that is neither's goes to the backbone.

    ValueError: a tap that the file holds twice.
    """
    split = Split({}, {})
    for name, tensor in state.items():
        ours = _strategy_name(name)
        if ours in split.strategy:
            raise ValueError(
                f"{name} is in the file twice, flattened and in the U-Net's tree; keep one of them"
            )
        split[ours is not None][ours or name] = tensor
    return split


def _strategy_name(name: str) -> str | None:
    """Our name of an official tensor of a strategy; None for the backbone's."""
    if name.startswith("mapping_"):
        return f"{MAPPER}{name}"
    if flat := _FLAT.fullmatch(name):
        side, level, mid, i, j, attention, suffix = flat.groups()
        tap = _FLAT_TAPS.get((attention, suffix))
        site = f"{mid or f'{side}_blocks.{level}'}.attentions.{i}.transformer_blocks.{j}.{attention}"
        return f"{TAPS[tap][0]}.taps.{site}.{tap}.weight" if tap else None
    tap = name.split(".")[-2] if name.count(".") else ""
    return f"{TAPS[tap][0]}.taps.{name}" if tap in TAPS else None


def export_videobooth(
    root: Mapping[str, Tensor], *, taps_in_unet: bool = False
) -> dict[str, dict[str, Tensor]]:
    """The reverse: a whole model's state dict -> ``{"ema_unet": U-Net, "ema": mapper}``, the keys of its two files.

    root: as ``Injected.state_dict`` names it (``backbone.``, ``strategy.``). taps_in_unet: repeat the taps in the
    U-Net's tree, where a strict load into the released code's plain U-Net would not expect them.
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


# ---- Stable Diffusion 1.x --------------------------------------------------------------------------------------------


def of_video_only(name: str) -> bool:
    """Whether a U-Net tensor has no counterpart in an image model: attention over time, the watermark branch."""
    return name.startswith("watermark_") or not {"attn_temp", "norm_temp"}.isdisjoint(name.split("."))


def from_diffusers_unet(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An image U-Net, inflated: what it lacks keeps `own`'s initialisation, which adds nothing to a frame's output.

    Every frame of a still video then equals the image model's output (section 3.1 of VideoBooth; Tune-A-Video).
    """
    return {**{name: tensor for name, tensor in own.items() if of_video_only(name)}, **state}


def export_diffusers_unet(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The image model inside a video U-Net, under diffusers' names; what is of video only is left out."""
    return {name: tensor for name, tensor in backbone.items() if not of_video_only(name)}


SAME: Mapping[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}
"""Of diffusers' ``config.json``: what this U-Net is, and an absent entry means."""


def unlike(settings: Mapping[str, Any], same: Mapping[str, Any] = SAME) -> list[str]:
    """The entries in which a U-Net's settings are not `same`: none of them shows in a tensor's shape."""
    return [
        f"{name} is {settings[name]!r}, this U-Net has {value!r}: it cannot be loaded"
        for name, value in same.items()
        if settings.get(name, value) != value
    ]


def unlike_diffusers(settings: Mapping[str, Any], config: UNetConfig) -> list[str]:
    """What of a diffusers U-Net's ``config.json`` is unlike `config`, each with its mending; some of it shows in no
    tensor's shape (heads, groups, positions, the order of the time embedding)."""
    down, up = settings.get("down_block_types", ()), settings.get("up_block_types", ())
    attends = tuple(kind.startswith("CrossAttn") for kind in down)
    heads = settings.get("num_attention_heads") or settings.get(
        "attention_head_dim", 8
    )  # upstream's misnomer
    wanted = {
        "channels": ("block_out_channels", settings.get("block_out_channels")),
        "layers_per_block": ("layers_per_block", settings.get("layers_per_block", 2)),
        "heads": ("attention_head_dim", heads),
        "norm_groups": ("norm_num_groups", settings.get("norm_num_groups", 32)),
        "linear_projection": ("use_linear_projection", settings.get("use_linear_projection", False)),
        "down_attention": ("down_block_types", attends),
        "positions": ("what its attention knows of positions", "none"),
        "in_channels": ("in_channels", settings.get("in_channels", 4)),
        "out_channels": ("out_channels", settings.get("out_channels", 4)),
        "text_dim": ("cross_attention_dim", settings.get("cross_attention_dim")),
    }
    follows = {
        "in_channels": "autoencoder",
        "out_channels": "autoencoder",
        "text_dim": "clip",
    }  # set by the run
    out = []
    for field, (name, value) in wanted.items():
        value, ours = (tuple(v) if isinstance(v, list) else v for v in (value, getattr(config, field)))
        if value != ours:
            fix = (
                f"choose the --{follows[field]} it was made with" if field in follows else _flag(field, value)
            )
            out.append(f"{name} is {value}, unet.{field} is {ours}: {fix}")
    out += unlike(settings)
    if tuple(kind.startswith("CrossAttn") for kind in reversed(up)) != attends:
        out.append(
            f"up_block_types {list(up)} do not mirror down_block_types {list(down)}: it cannot be loaded"
        )
    return out


def _flag(field: str, value: Any) -> str:
    values: Iterable[Any] = value if isinstance(value, tuple) else (value,)
    return f"set --unet.{field.replace('_', '-')} {' '.join(map(str, values))}"
