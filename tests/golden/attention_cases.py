"""Bare attentions of VideoBooth, Tune-A-Video and Text2Video-Zero: frame plans and taps against a file.

The originals fold frames into the batch. As with the U-Net, each output is checked in float32 and float64 against the
stored tensor, and in float64 against the naive computation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from cases import FLOAT64, CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from dense import DenseUNet
from einops import rearrange
from torch import Tensor, nn
from unet_cases import INJECTED, reference_of, strategies_of

from dit_booth.attention import FramePlan, Segment
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import QKV, Injection, Role, no_injection
from dit_booth.models.layers import Attention
from dit_booth.models.unet.blocks import TransformerBlock, UNetInputs
from dit_booth.models.unet.model import UNetConfig


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output of an attention or a transformer block."""
    for name in sorted(name for name in outputs(tensors) if re.sub(r"_f1$", "", name) in RECIPES):
        stored = tensors[f"outputs.{name}"]
        for dtype in (torch.float32, torch.float64):
            made = Original(info, cast(tensors, dtype), name).ours()
            yield CaseResult(labelled(name, dtype), worst(made, stored), tolerance(dtype, stored))
        exact = Original(info, cast(tensors, torch.float64), name).dense()
        yield CaseResult(f"{name} dense float64", worst(made, exact), FLOAT64)


@dataclass(frozen=True)
class Recipe:
    """An output: the module whose weights it takes, what that is, and (across frames) its plan and image."""

    module: str
    role: Role | None
    plan: str = "self"
    image: bool = False


RECIPES = {
    "fine": Recipe("self", "cross_frame", "first+previous", image=True),
    "none": Recipe("self", "cross_frame", "first+previous"),  # VideoBooth's fine attention without an image
    "self": Recipe("self", "cross_frame", "first"),
    "out": Recipe("attn", "cross_frame", "first+previous"),
    "cross": Recipe("cross", "text"),
    "temporal": Recipe("temporal", "temporal"),
    "block": Recipe("block", None, "first+previous"),
}


class Original:
    """One output's weights and inputs, run by our modules or naively; ``_f1`` takes as many videos of one frame."""

    def __init__(self, info: Info, tensors: Tensors, name: str) -> None:
        self.recipe, self.config = RECIPES[re.sub(r"_f1$", "", name)], info["config"]
        self.weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
        self.heads = self.config["heads"]
        rows, frames = None, self.config.get("video_length") or self.config["frames"]
        if name.endswith("_f1"):
            rows, frames = len(tensors[f"outputs.{name}"]), 1
        self.inputs = {
            k.removeprefix("inputs."): rearrange(x[:rows], "(b f) n c -> b f n c", f=frames)
            for k, x in tensors.items()
            if k in ("inputs.hidden_states", "inputs.encoder_hidden_states", "inputs.exemplar_latent")
        }

    @torch.no_grad()
    def ours(self) -> Tensor:
        x, text = self.inputs["hidden_states"], self.inputs.get("encoder_hidden_states", torch.empty(0))
        if self.recipe.role is None:
            return rearrange(self.block(x, text), "b f n c -> (b f) n c")
        attention = self.attention()
        if self.recipe.role == "temporal":  # plain attention over the tokens of each row
            x = rearrange(x, "b f n c -> (b f) 1 n c")
            return attention(x, x, seen_by_all(1), no_injection)[:, 0]
        source = text if self.recipe.role == "text" else x
        frames = FramePlan(self.recipe.plan).frames(x.shape[1])
        return rearrange(attention(x, source, frames, self.inject(attention)), "b f n c -> (b f) n c")

    def attention(self) -> Attention:
        width, source = self.weights[f"{self.recipe.module}.to_k.weight"].shape
        assert self.recipe.role is not None
        attention = Attention(self.recipe.module, self.recipe.role, width, self.heads, source)
        names = {
            k: f"{self.recipe.module}.{k.replace('to_out.', 'to_out.0.')}" for k in attention.state_dict()
        }
        attention.load_state_dict({k: self.weights[name] for k, name in names.items()}, assign=True)
        return attention

    def inject(self, attention: Attention) -> Injection:
        """The taps of VideoBooth's strategies, where the original has their parameters."""
        module, x = self.recipe.module, self.inputs["hidden_states"]
        injected = {k: w for k, w in self.weights.items() if k.startswith(f"{module}.") and owned(k)}
        strategies = strategies_of(injected, [attention.site]).to(x.dtype)
        if not self.recipe.image:
            return strategies.bind(strategies.names)
        first = self.inputs["exemplar_latent"][:, 0]
        conditions = strategies(reference_of(first), {"matched": {module: first}}, strategies.names)
        return strategies.bind(strategies.names, conditions)

    def block(self, x: Tensor, text: Tensor) -> Tensor:
        """Tune-A-Video's transformer block is VideoBooth's; these files give every frame a text of its own."""
        name, width, plan = self.recipe.module, x.shape[-1], FramePlan(self.recipe.plan).frames(x.shape[1])
        config = UNetConfig(
            channels=(width,),
            norm_groups=1,
            heads=self.heads,
            text_dim=text.shape[-1],
            down_attention=(True,),
        )
        block = TransformerBlock(name, width, config)
        own = {k.removeprefix(f"{name}."): w for k, w in self.weights.items() if k.startswith(f"{name}.")}
        block.load_state_dict(own, assign=True)
        texts = Injection({f"{name}.attn2": [(TextOfEachFrame(block.attn2, text), None)]})
        return block(x, UNetInputs(x[:, 0, 0], text[:, 0], plan, texts))

    def dense(self) -> Tensor:
        """The naive computation of the same."""
        module, dense = self.recipe.module, DenseUNet(self.weights, self.heads, groups=1)
        x, text = self.inputs["hidden_states"], self.inputs.get("encoder_hidden_states", torch.empty(0))
        flat = rearrange(x, "b f n c -> (b f) n c")
        if self.recipe.role == "text":
            suffix = "_global" if f"{module}.to_k_global.weight" in self.weights else ""
            return dense.plain_attention(module, flat, rearrange(text, "b f l c -> (b f) l c"), suffix)
        if self.recipe.role == "temporal":
            return dense.plain_attention(module, flat, flat)
        if self.recipe.role is None:
            dense.text = text
            return rearrange(dense.block(module, x), "b f n c -> (b f) n c")
        dense.stage = "fine" if f"{module}.to_k_new.weight" in self.weights else "plain"
        image = self.inputs["exemplar_latent"][:, 0] if self.recipe.image else None
        return rearrange(dense.cross_frame(module, x, image, self.recipe.plan), "b f n c -> (b f) n c")


def owned(name: str) -> bool:
    """Return True if a parameter of the original belongs to a strategy."""
    return name.split(".")[-2] in INJECTED


class TextOfEachFrame(nn.Module):
    """A tap that lets frame i read text i (text: b f l c), where our blocks give all frames one text."""

    def __init__(self, attention: Attention, text: Tensor) -> None:
        super().__init__()
        self.attention, self.text = attention, text

    def forward(self, qkv: QKV, image: None) -> QKV:
        k, v = qkv.heads(self.attention.to_k(self.text)), qkv.heads(self.attention.to_v(self.text))
        return replace(qkv, segments=(Segment(k, v, FramePlan("self").frames(self.text.shape[1])),))
