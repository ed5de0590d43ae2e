"""DiT and Latte: `VideoDiT` with the original's weights, by the maps that load the official files.

Each output is checked by our float32 and float64 runs against the stored tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from cases import CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from einops import rearrange
from torch import Tensor
from torch.nn.functional import silu

from dit_booth.diffusion import guide
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import VideoDiT
from dit_booth.models.upstream.dit import from_official, infer_channels, infer_config
from dit_booth.models.weights import load_strictly

DIT_GUIDED = 3  # channels that DiT's released code guides; Latte's guides all


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output of a file whose weights have DiT's names."""
    weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    latte = "temp_embed" in weights
    model = build(info, weights)
    made: dict[str, Callable[[VideoDiT, Tensors], Tensor]] = {
        "out": partial(predict, latte=latte),
        "cfg": partial(guided, latte=latte),
        "t_emb": lambda dit, given: dit.t_embedder(given["inputs.t"], dit.t_embedder.mlp[0].weight.dtype),
        "x_emb": lambda dit, given: dit.x_embedder(video(given, latte))[:, 0],
    }
    stored = outputs(tensors)
    for name in sorted(set(stored) & set(made)):
        for dtype in (torch.float32, torch.float64):
            with torch.no_grad():
                ours = made[name](model.to(dtype), cast(tensors, dtype))
            yield CaseResult(labelled(name, dtype), worst(ours, stored[name]), tolerance(dtype, stored[name]))


def build(info: Info, weights: Tensors) -> VideoDiT:
    """The model that the weights belong to; only its heads are in the json alone."""
    state = from_official(weights)
    config, channels = infer_config(state, heads=info["config"]["num_heads"]), infer_channels(state)
    pooled = state["text_embedder.weight"].shape[1] if "text_embedder.weight" in state else 1
    dit = VideoDiT(
        config,
        channels=channels.latent,
        out_channels=channels.output,
        text_dim=1,
        text_embed_dim=pooled,
    )
    load_strictly(dit, state, "golden")
    return dit


def video(tensors: Tensors, latte: bool) -> Tensor:
    return tensors["inputs.x"] if latte else rearrange(tensors["inputs.x"], "b c h w -> b 1 c h w")


def conditioned(tensors: Tensors, rows: int) -> Text | Tensor:
    """Class labels; no class at all, which is class 0 of none; or Latte's text, all its tokens in one vector."""
    if "inputs.text_embedding" in tensors:
        tokens = rearrange(tensors["inputs.text_embedding"], "b 1 l c -> b l c")
        return Text(tokens, silu(rearrange(tokens, "b l c -> b (l c)")))
    return tensors.get("inputs.y", torch.zeros(rows, dtype=torch.long))


def predict(dit: VideoDiT, tensors: Tensors, latte: bool) -> Tensor:
    x = video(tensors, latte)
    out = dit(x, tensors["inputs.t"], conditioned(tensors, len(x)))
    return out if latte else out[:, 0]


def guided(dit: VideoDiT, tensors: Tensors, latte: bool) -> Tensor:
    """The first half of the rows twice, conditional and unconditional; variances stay each half's own."""
    x = video(tensors, latte)
    half = x[: len(x) // 2]
    out = dit(torch.cat([half, half]), tensors["inputs.cfg_t"], conditioned(tensors, len(x)))
    channels = half.shape[2] if latte else DIT_GUIDED
    cond, uncond = out.chunk(2)
    mixed = guide(cond, uncond, float(tensors["inputs.cfg_scale"]), channels)[:, :, :channels]
    both = torch.cat([torch.cat([mixed, part[:, :, channels:]], dim=2) for part in (cond, uncond)])
    return both if latte else both[:, 0]
