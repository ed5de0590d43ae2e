"""Stable Diffusion 1.x's U-Net (diffusers) as a video U-Net and back: pure maps, and a check of its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from dit_booth.models.unet.config import UNetConfig
from dit_booth.models.weights import JsonObject

FIXED_SETTINGS: JsonObject = {
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
"""Entries of diffusers' ``config.json`` that `VideoUNet` has no option for, and the defaults of absent entries."""

_SET_BY_RUN = {"in_channels": "autoencoder", "out_channels": "autoencoder", "text_dim": "clip"}


# ---- names -------------------------------------------------------------------------------------------------


def is_video_only(name: str) -> bool:
    """Tell whether a U-Net tensor has no counterpart in an image model: temporal attention, the watermark branch."""
    return name.startswith("watermark_") or not {"attn_temp", "norm_temp"}.isdisjoint(name.split("."))


def from_diffusers(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inflate an image U-Net: layers that it lacks keep the initialisation in `own`, which adds nothing to a frame.

    Every frame of a still video then equals the image model's output (section 3.1 of VideoBooth; Tune-A-Video).
    """
    return {**{name: tensor for name, tensor in own.items() if is_video_only(name)}, **state}


def to_diffusers(backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Extract the image model of a video U-Net, under diffusers' names; layers that only video has are left out."""
    return {name: tensor for name, tensor in backbone.items() if not is_video_only(name)}


# ---- settings ----------------------------------------------------------------------------------------------


def find_unsupported(settings: JsonObject, fixed: JsonObject = FIXED_SETTINGS) -> list[str]:
    """Return one line per entry that differs from `fixed`; no tensor's shape shows these differences."""
    return [
        f"{name} is {settings[name]!r}, this U-Net has {value!r}: it cannot be loaded"
        for name, value in fixed.items()
        if settings.get(name, value) != value
    ]


def find_unet_mismatches(settings: JsonObject, config: UNetConfig) -> list[str]:
    """Return one line per mismatch between a diffusers U-Net's ``config.json`` and `config`, each with its fix.

    No tensor's shape shows some of them (heads, groups, positions, the order of the timestep embedding).
    """
    down, up = settings.get("down_block_types", ()), settings.get("up_block_types", ())
    attends = tuple(kind.startswith("CrossAttn") for kind in down)
    # attention_head_dim is upstream's misnomer for the number of heads
    heads = settings.get("num_attention_heads") or settings.get("attention_head_dim", 8)
    wanted = {
        "channels": ("block_out_channels", settings.get("block_out_channels")),
        "layers_per_block": ("layers_per_block", settings.get("layers_per_block", 2)),
        "heads": ("attention_head_dim", heads),
        "norm_groups": ("norm_num_groups", settings.get("norm_num_groups", 32)),
        "linear_projection": ("use_linear_projection", settings.get("use_linear_projection", False)),
        "down_attention": ("down_block_types", attends),
        "positions": ("kind of positions", "none"),
        "in_channels": ("in_channels", settings.get("in_channels", 4)),
        "out_channels": ("out_channels", settings.get("out_channels", 4)),
        "text_dim": ("cross_attention_dim", settings.get("cross_attention_dim")),
    }
    out = []
    for field, (name, value) in wanted.items():
        value, ours = (tuple(v) if isinstance(v, list) else v for v in (value, getattr(config, field)))
        if value != ours:
            out.append(f"{name} is {value}, unet.{field} is {ours}: {_fix(field, value)}")
    out += find_unsupported(settings)
    if tuple(kind.startswith("CrossAttn") for kind in reversed(up)) != attends:
        out.append(
            f"up_block_types {list(up)} do not mirror down_block_types {list(down)}: it cannot be loaded"
        )
    return out


def _fix(field: str, value: object) -> str:
    if field in _SET_BY_RUN:
        return f"choose the --{_SET_BY_RUN[field]} it was made with"
    values: Sequence[object] = value if isinstance(value, tuple) else (value,)
    return f"set --unet.{field.replace('_', '-')} {' '.join(map(str, values))}"
