"""DiT's and Latte's weights under their official names and ours: pure maps, and inflation to video.

Official files: ``DiT-XL-2-256x256.pt`` and -512x512 (arXiv 2212.09748), Latte's (arXiv 2401.03048). Both use the same
names; Latte alternates space and time (layout `interleaved`) and embeds frame positions. To run DiT itself::

    state = from_official(read_any(Path("DiT-XL-2-256x256.pt"))[0])
    config, channels = infer_config(state), infer_channels(state)
    dit = VideoDiT(config, channels=channels.latent, out_channels=channels.output, text_dim=1, text_embed_dim=1)
    load_strictly(dit, state, "DiT-XL/2")
    prediction = dit(x, t, labels)  # x: b 1 c h w

``--weights DiT-XL-2-256x256.pt`` inflates it to the run's video model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor

from dit_booth.models.dit.config import SIZES, DiTConfig
from dit_booth.models.positions import sincos, sincos_2d

_LAYERS = {  # of a block, official: ours
    "adaLN_modulation.1": "modulation.linear",
    "attn.proj": "{attention}.to_out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
_TOP = {"text_embedding_projection.1": "text_embedder"}  # Latte with text; the other names are ours, too
_TABLE = "y_embedder.embedding_table.weight"


class Channels(NamedTuple):
    """Channels of the latents and of the prediction; DiT's weights also predict a variance per channel."""

    latent: int
    output: int


def is_official_dit(state: Mapping[str, Tensor]) -> bool:
    """Tell whether these are DiT's or Latte's weights under their official names."""
    return "blocks.0.attn.qkv.weight" in state and "x_embedder.proj.weight" in state


# ---- names -------------------------------------------------------------------------------------------------


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map official names to those of `VideoDiT` with layout `image` (DiT) or `interleaved` (Latte).

    Drops the fixed positions: `VideoDiT` computes them. Latte without classes or text gets a table of one zero class.
    Unknown names stay, for a strict load to list. ValueError: positions that are not sin-cos.
    """
    _check_positions(state)
    latte, out = "temp_embed" in state, {}
    for name, tensor in state.items():
        if name in ("pos_embed", "temp_embed"):
            continue
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not found:
            layer, _, leaf = name.rpartition(".")
            out[f"{_TOP.get(layer, layer)}.{leaf}"] = tensor
            continue
        i, layer, leaf = found.groups()
        attention = "attn_temp" if latte and int(i) % 2 else "attn1"
        if layer == "attn.qkv":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                out[f"blocks.{i}.{attention}.to_{letter}.{leaf}"] = part.clone()
        else:
            out[f"blocks.{i}.{_LAYERS.get(layer, layer).format(attention=attention)}.{leaf}"] = tensor
    if _TABLE not in out and "text_embedder.weight" not in out:
        out[_TABLE] = torch.zeros_like(out["t_embedder.mlp.2.bias"]).unsqueeze(0)
    return out


def to_official(
    state: Mapping[str, Tensor], *, height: int, width: int, frames: int = 0
) -> dict[str, Tensor]:
    """Map back to official names, with the fixed positions of a token grid and, for Latte, of `frames` (DiT: 0)."""
    back = {ours: theirs for theirs, ours in (_LAYERS | _TOP).items()}
    hidden, device = state["t_embedder.mlp.2.bias"].shape[0], state["t_embedder.mlp.2.bias"].device
    out = {"pos_embed": sincos_2d(height, width, hidden, device).unsqueeze(0)}
    if frames:
        out["temp_embed"] = sincos(torch.arange(frames, device=device), hidden).float().unsqueeze(0)
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        block, layer = (
            (found[1], found[2]) if (found := re.fullmatch(r"(blocks\.\d+\.)(.+)", layer)) else ("", layer)
        )
        layer = re.sub(r"attn1\.|attn_temp\.", "{attention}.", layer)
        if layer.endswith((".to_k", ".to_v")):
            continue
        if layer.endswith(".to_q"):
            parts = [state[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            out[f"{block}attn.qkv.{leaf}"] = torch.cat(parts)
        elif name != _TABLE or len(tensor) > 1 or not frames:
            out[f"{block}{back.get(layer, layer)}.{leaf}"] = tensor
    return out


def _check_positions(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a file's positions are not the fixed ones that `VideoDiT` adds."""
    for name in {"pos_embed", "temp_embed"} & set(state):
        given = state[name][0].float()  # n d
        count, dim = given.shape
        side = round(count**0.5)
        if name == "temp_embed":
            fixed = sincos(torch.arange(count, device=given.device), dim).float()
        else:
            fixed = sincos_2d(side, side, dim, given.device) if side * side == count else given.new_empty(0)
        known = fixed.shape == given.shape and (given.is_meta or torch.allclose(given, fixed, atol=1e-5))
        if not known:
            raise ValueError(
                f"{name} {tuple(state[name].shape)} is not the fixed sin-cos embedding of a square grid or of frames,"
                " the only one that VideoDiT adds; these weights cannot be loaded"
            )


# ---- sizes -------------------------------------------------------------------------------------------------


def infer_channels(state: Mapping[str, Tensor]) -> Channels:
    """Read the channels off the shapes of weights under our names."""
    patch = state["x_embedder.proj.weight"].shape[-1]
    output = state["final_layer.linear.weight"].shape[0] // patch**2
    return Channels(state["x_embedder.proj.weight"].shape[1], output)


def infer_config(state: Mapping[str, Tensor], heads: int = 0) -> DiTConfig:
    """Read the configuration off the shapes of weights that `from_official` named.

    heads: no shape shows their number; 0: that of the size with this depth and width (DiT, table 1).
    ValueError: there is no such size.
    """
    hidden = len(state["t_embedder.mlp.2.bias"])
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    latte = "blocks.1.attn_temp.to_q.weight" in state
    known = {(s.depth, s.hidden): s.heads for s in SIZES.values()}
    if not heads and (depth, hidden) not in known:
        raise ValueError(
            f"heads is 0, and no DiT size has depth {depth} and width {hidden}; give the number of heads"
        )
    text = _TABLE not in state
    return DiTConfig(
        depth=depth,
        hidden=hidden,
        heads=heads or known[depth, hidden],
        patch=cast(Literal[1, 2, 4, 8], state["x_embedder.proj.weight"].shape[-1]),
        layout="interleaved" if latte else "image",
        plan="self",
        conditioning="adaln_zero" if text else "class_label",
        classes=1000 if text else len(state[_TABLE]) - 1,
        head_text=not text,
    )


# ---- inflation ---------------------------------------------------------------------------------------------


def inflate(image: Mapping[str, Tensor], own: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Inflate DiT's weights (named by `from_official`) to the whole initial state dict of a video model with text.

    own: the video model's state dict; layers that DiT lacks keep this initialisation. Before any training, frame 0 of a
    video equals DiT's prediction for the null class, whatever the text, if it reads no other frame (plans self, ...):

    * layers that start at zero stay (attention to the text, the convolution of tokens);
    * temporal attention has a gate of zero, so frames do not mix at first;
    * the text projection starts at zero, and the null class's vector is added to the timestep embedder's bias;
    * the position of frame 0, a constant, is subtracted from the patch embedding's bias;
    * the predicted variance is dropped.

    ValueError: options that DiT's weights do not fit.
    """
    _check_options(image, config)
    out = {
        name: tensor for name, tensor in own.items() if {"attn_temp", "attn2", "conv"} & set(name.split("."))
    }
    out |= {name: tensor for name, tensor in image.items() if name != _TABLE}
    hidden = config.shape.hidden
    for name in [n for n in image if ".modulation.linear." in n]:
        if "attn_temp" in config.parts(0) and name in own:
            attn1, mlp = image[name].chunk(2)
            out[name] = torch.cat([attn1, torch.zeros_like(attn1), mlp])
    for name in [n for n in own if n.startswith("text_embedder.")]:
        out[name] = torch.zeros_like(own[name])
    out["t_embedder.mlp.2.bias"] = image["t_embedder.mlp.2.bias"] + image[_TABLE][-1]
    if config.layout != "image":
        bias = image["x_embedder.proj.bias"]
        out["x_embedder.proj.bias"] = bias - sincos(torch.zeros(1, device=bias.device), hidden)[0].to(
            bias.dtype
        )
    for leaf in ("weight", "bias"):
        name = f"final_layer.linear.{leaf}"
        by_channel = rearrange(image[name], "(pq c) ... -> pq c ...", pq=config.patch**2)
        kept = own[name].shape[0] // config.patch**2
        out[name] = rearrange(by_channel[:, :kept], "pq c ... -> (pq c) ...").clone()
    return out


def _check_options(image: Mapping[str, Tensor], config: DiTConfig) -> None:
    if _TABLE not in image or any(".attn_temp." in name for name in image):
        raise ValueError("these are Latte's weights, a video model; only DiT's image model can be inflated")
    fitting = {
        "layout": ("factorised", "joint", "image"),
        "conditioning": ("adaln_zero", "cross_attention"),
        "positions": ("sincos",),
        "mlp": ("gelu",),
        "qk_norm": (False,),
    }
    for name, values in fitting.items():
        if getattr(config, name) not in values:
            raise ValueError(
                f"dit.{name} is {getattr(config, name)!r}, which DiT's weights do not fit; use"
                f" {' or '.join(map(str, values))}"
            )
