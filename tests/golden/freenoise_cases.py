"""FreeNoise: rescheduled noise, windows and their weights, temporal attention fused over windows, a whole block."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from cases import CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from einops import rearrange, repeat
from torch import Tensor

from dit_booth.attention import Segment, WindowFusion, attend, attend_in_windows
from dit_booth.attention.window_fusion import cut_windows, fuse, triangle
from dit_booth.diffusion.free_noise import source_frames


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output: ``noise_TAG_*``, and of ``attn_TAG`` and ``block`` the views, weights and results."""
    for name in sorted(outputs(tensors)):
        stored = tensors[f"outputs.{name}"]
        found = re.fullmatch(
            r"(noise_\w|attn_\w+|block)_(rescheduled|source_frame|views|weights|windowed|plain)", name
        )
        if found is None:
            continue
        tag, what = found[1], found[2]
        config = info["config"][tag]
        if what in ("views", "weights", "source_frame", "rescheduled"):
            yield CaseResult(name, worst(table(tag, what, config, tensors), stored))
            continue
        for dtype in (torch.float32, torch.float64):
            given = cast(tensors, dtype)
            kind = Block if tag == "block" else TemporalAttention
            made = kind(tag, config, given).output(windowed=what == "windowed")
            yield CaseResult(labelled(name, dtype), worst(made, stored), tolerance(dtype, stored))


def table(tag: str, what: str, config: Info, tensors: Tensors) -> Tensor:
    if what == "views":
        fusion, frames = WindowFusion(config["window"], config["stride"]), config["frames"]
        starts = fusion.starts(frames, released=True)
        return torch.tensor([[start, start + config["window"]] for start in starts])
    if what == "weights":
        return triangle(config["window"])
    permutations = list(tensors[f"inputs.{tag}_permutations"])
    source = source_frames(config["frames"], config["win"], permutations)
    if what == "source_frame":
        return source
    initial = repeat(tensors[f"inputs.{tag}_initial"], "s 1 ... -> s b ...", b=config["bs"])
    return initial[:, :, :, source]


class TemporalAttention:
    """One temporal attention: `attend_in_windows`, or with relative positions its windows and their fusion alone."""

    def __init__(self, tag: str, config: Info, given: Tensors, module: str = "") -> None:
        self.tag, self.config, self.given = tag, config, given
        self.prefix = f"weights.{tag}.{module}"
        self.fusion = WindowFusion(config["window"], config["stride"])

    def output(self, windowed: bool) -> Tensor:
        return self(self.given[f"inputs.{self.tag}_x"], windowed)

    def __call__(self, x: Tensor, windowed: bool) -> Tensor:
        q, k, v = (
            rearrange(
                x @ self.given[f"{self.prefix}to_{y}.weight"].T,
                "b f (k d) -> b 1 f k d",
                k=self.config["heads"],
            )
            for y in "qkv"
        )
        if self.config.get("relative_position"):
            y = self.relative(q, k, v, windowed)
        elif windowed:
            y = attend_in_windows(q, (Segment(k, v, ((0,),)),), self.fusion, released=True)
        else:
            y = attend(q, (Segment(k, v, ((0,),)),))
        y = rearrange(y, "b 1 f k d -> b f (k d)")
        return y @ self.given[f"{self.prefix}to_out.0.weight"].T + self.given[f"{self.prefix}to_out.0.bias"]

    def relative(self, q: Tensor, k: Tensor, v: Tensor, windowed: bool) -> Tensor:
        frames = q.shape[2]
        count = self.fusion.window if windowed else frames
        starts = self.fusion.starts(frames, released=True) if windowed else (0,)
        q, k, v = (cut_windows(y[:, 0], starts, count) for y in (q, k, v))
        most, at = self.config["temporal_length"], torch.arange(count)
        apart = (at[None, :] - at[:, None]).clamp(-most, most) + most
        e_k, e_v = (
            self.given[f"{self.prefix}relative_position_{y}.embeddings_table"][apart] for y in "kv"
        )  # q k d
        scores = torch.einsum("bwqhd,bwkhd->bwhqk", q, k) + torch.einsum("bwqhd,qkd->bwhqk", q, e_k)
        shares = (scores * q.shape[-1] ** -0.5).softmax(-1)
        out = torch.einsum("bwhqk,bwkhd->bwqhd", shares, v) + torch.einsum("bwhqk,qkd->bwqhd", shares, e_v)
        return fuse(out, starts, frames).unsqueeze(1)


class Block:
    """A temporal transformer: norm and projection around a block with two windowed self-attentions."""

    def __init__(self, tag: str, config: Info, given: Tensors) -> None:
        self.config, self.given = config, given

    def weight(self, name: str) -> Tensor:
        return self.given[f"weights.block.{name}"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weight(f"{name}.weight").T + self.weight(f"{name}.bias")

    def norm(self, name: str, x: Tensor) -> Tensor:
        name = f"transformer_blocks.0.{name}"
        return F.layer_norm(x, x.shape[-1:], self.weight(f"{name}.weight"), self.weight(f"{name}.bias"))

    def output(self, windowed: bool) -> Tensor:
        x, config = self.given["inputs.block_x"], self.config
        y = F.group_norm(
            x,
            config["groups"],
            self.weight("norm.weight"),
            self.weight("norm.bias"),
            config["group_norm_eps"],
        )
        y = self.linear("proj_in", rearrange(y, "b c f h w -> (b h w) f c"))
        for i in (1, 2):
            attention = TemporalAttention("block", config, self.given, f"transformer_blocks.0.attn{i}.")
            y = y + attention(self.norm(f"norm{i}", y), windowed)
        value, gate = self.linear("transformer_blocks.0.ff.net.0.proj", self.norm("norm3", y)).chunk(
            2, dim=-1
        )
        y = y + self.linear("transformer_blocks.0.ff.net.2", value * F.gelu(gate))
        height, width = x.shape[-2:]
        return x + rearrange(self.linear("proj_out", y), "(b h w) f c -> b c f h w", h=height, w=width)
