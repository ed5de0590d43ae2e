"""The original's networks written naively, in float64: the oracle of sizes for which there is no golden file.

Keys are concatenated and softmaxed in one tensor, norms are written out, frame 0 is repeated, the reference passes the
network before the video, as many frames of it as are given. No code is shared with dit_booth; weights have upstream's
names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(b n c) over (b m c)."""
    q, k, v = (rearrange(x, "b n (k d) -> b k n d", k=heads) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return rearrange(weights @ v, "b k n d -> b n (k d)")


def mapper(weights: Mapping[str, Tensor], states: list[Tensor]) -> Tensor:
    """Five of (b (1 + n) c) -> b 5 d."""
    w = {name: x.double() for name, x in weights.items()}

    def mlp(p: str, x: Tensor) -> Tensor:
        for linear, norm in ((0, 1), (3, 4)):
            x = x @ w[f"{p}.{linear}.weight"].T + w[f"{p}.{linear}.bias"]
            x = F.layer_norm(x, x.shape[-1:], w[f"{p}.{norm}.weight"], w[f"{p}.{norm}.bias"])
            x = torch.where(x > 0, x, 0.01 * x)
        return x @ w[f"{p}.6.weight"].T + w[f"{p}.6.bias"]

    words = []
    for j, state in enumerate(states):
        s = state.double()
        words.append(
            mlp(f"mapping_{j}", s[:, :1]) + mlp(f"mapping_patch_{j}", s[:, 1:]).mean(1, keepdim=True)
        )
    return torch.cat(words, dim=1)


class DenseUNet:
    """VideoBooth's U-Net from its weights. The stage is ``plain``, ``coarse`` or ``fine``."""

    def __init__(
        self, weights: Mapping[str, Tensor], heads: int, groups: int, plan: str = "first+previous"
    ) -> None:
        self.w = {name: x.double() for name, x in weights.items()}
        self.heads, self.groups, self.plan = heads, groups, plan
        self.stage = "plain"
        self.image: dict[str, Tensor] = {}  # the reference's normalised hidden state at each attn1: b n c
        self.seen: dict[str, Tensor] = {}

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        stage: str = "plain",
        reference: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x (b f c h w) at t (b,) with text (b l d); `reference` is its latents (b r c h w), times and text."""
        self.stage, self.image, self.seen = stage, {}, {}
        if reference is not None:
            self.forward(*reference)
            self.image = {site: hidden[:, 0] for site, hidden in self.seen.items()}
        return self.forward(x, t, text)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """uncond + scale (cond - uncond) in the first three channels, the conditional prediction in the others."""
        mixed = uncond[:, :, :3] + scale * (cond[:, :, :3] - uncond[:, :, :3])
        return torch.cat([mixed, cond[:, :, 3:]], dim=2)

    # ---- the network -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.time, self.text = self.time_embedding(t), text.double()
        x = self.levels("", self.conv("conv_in", x.double()), middle=True)
        if "watermark_zero_out.weight" in self.w:
            branch = self.levels("watermark_", x, middle=False)
            x = x + self.conv("watermark_zero_out", branch, padding=0)
        return self.conv("conv_out", F.silu(self.group_norm("conv_norm_out", x, 1e-5, over_frames=True)))

    def levels(self, prefix: str, x: Tensor, middle: bool) -> Tensor:
        """Down, through the middle block, and up again."""
        skips = [x]
        for i in range(self.count(f"{prefix}down_blocks")):
            level = f"{prefix}down_blocks.{i}"
            for j in range(self.count(f"{level}.resnets")):
                x = self.layer(level, j, x)
                skips.append(x)
            if f"{level}.downsamplers.0.conv.weight" in self.w:
                x = self.conv(f"{level}.downsamplers.0.conv", x, stride=2)
                skips.append(x)
        if middle:
            x = self.resnet("mid_block.resnets.1", self.layer("mid_block", 0, x))
        for i in range(self.count(f"{prefix}up_blocks")):
            level = f"{prefix}up_blocks.{i}"
            for j in range(self.count(f"{level}.resnets")):
                x = self.layer(level, j, torch.cat([x, skips.pop()], dim=2))
            if f"{level}.upsamplers.0.conv.weight" in self.w:
                (h, w), (high, wide) = x.shape[-2:], skips[-1].shape[-2:]
                x = x[..., torch.arange(high) * h // high, :][..., torch.arange(wide) * w // wide]
                x = self.conv(f"{level}.upsamplers.0.conv", x)
        return x

    def count(self, prefix: str) -> int:
        return len(
            {
                name.removeprefix(f"{prefix}.").split(".")[0]
                for name in self.w
                if name.startswith(f"{prefix}.")
            }
        )

    def layer(self, level: str, j: int, x: Tensor) -> Tensor:
        x = self.resnet(f"{level}.resnets.{j}", x)
        name = f"{level}.attentions.{j}"
        return self.transformer(name, x) if f"{name}.norm.weight" in self.w else x

    def resnet(self, p: str, x: Tensor) -> Tensor:
        y = self.conv(f"{p}.conv1", F.silu(self.group_norm(f"{p}.norm1", x, 1e-5, over_frames=True)))
        y = y + self.linear(f"{p}.time_emb_proj", F.silu(self.time))[:, None, :, None, None]
        y = self.conv(f"{p}.conv2", F.silu(self.group_norm(f"{p}.norm2", y, 1e-5, over_frames=True)))
        if f"{p}.conv_shortcut.weight" in self.w:
            x = self.conv(f"{p}.conv_shortcut", x, padding=0)
        return x + y

    def transformer(self, p: str, x: Tensor) -> Tensor:
        y = self.group_norm(f"{p}.norm", x, 1e-6, over_frames=False)
        y = self.linear(f"{p}.proj_in", rearrange(y, "b f c h w -> b f (h w) c"))
        y = self.block(f"{p}.transformer_blocks.0", y)
        return x + rearrange(self.linear(f"{p}.proj_out", y), "b f (h w) c -> b f c h w", h=x.shape[-2])

    def block(self, p: str, x: Tensor) -> Tensor:
        """b f n c."""
        y = self.layer_norm(f"{p}.norm1", x)
        self.seen[f"{p}.attn1"] = y
        x = x + self.cross_frame(f"{p}.attn1", y)
        x = x + self.text_attention(f"{p}.attn2", self.layer_norm(f"{p}.norm2", x))
        value, gate = self.linear(f"{p}.ff.net.0.proj", self.layer_norm(f"{p}.norm3", x)).chunk(2, dim=-1)
        x = x + self.linear(f"{p}.ff.net.2", value * F.gelu(gate))
        y = rearrange(self.layer_norm(f"{p}.norm_temp", x), "b f n c -> (b n) f c")
        y = self.plain_attention(f"{p}.attn_temp", y, y)
        return x + rearrange(y, "(b n) f c -> b f n c", b=x.shape[0])

    # ---- attention -------------------------------------------------------------------------------------------------

    def cross_frame(self, p: str, x: Tensor, image: Tensor | None = None, plan: str | None = None) -> Tensor:
        """Frame i over [frame 0; frame i - 1], or the frames of another plan.

        With an image, frame 0's value becomes Attn(q0, [image; frame 0]).
        """
        suffix = "_new" if self.stage == "fine" else ""
        q, k, v = (self.linear(f"{p}.{name}", x) for name in ("to_q", f"to_k{suffix}", f"to_v{suffix}"))
        values = list(v.unbind(1))
        image = self.image.get(p) if image is None else image
        if image is not None:
            image = image.double()
            keys = torch.cat([self.linear(f"{p}.to_k_exemplar", image), k[:, 0]], dim=1)
            first = torch.cat([self.linear(f"{p}.to_v_exemplar", image), values[0]], dim=1)
            values[0] = softmax_attention(q[:, 0], keys, first, self.heads)
        out = []
        for i in range(x.shape[1]):
            read = {"first+previous": [0, max(i - 1, 0)], "first": [0], "self": [i]}[plan or self.plan]
            keys = torch.cat([k[:, j] for j in read], dim=1)
            out.append(
                softmax_attention(q[:, i], keys, torch.cat([values[j] for j in read], dim=1), self.heads)
            )
        return self.linear(f"{p}.to_out.0", torch.stack(out, dim=1))

    def text_attention(self, p: str, x: Tensor) -> Tensor:
        """Every frame over the video's text, or over its own (b f l d)."""
        frames, suffix = x.shape[1], "" if self.stage == "plain" else "_global"
        text = self.text if self.text.ndim == 4 else self.text[:, None].expand(-1, frames, -1, -1)
        y = self.plain_attention(p, x.flatten(0, 1), text.flatten(0, 1), suffix)
        return y.unflatten(0, (-1, frames))

    def plain_attention(self, p: str, x: Tensor, source: Tensor, suffix: str = "") -> Tensor:
        q, k, v = (
            self.linear(f"{p}.to_q", x),
            *(self.linear(f"{p}.{n}{suffix}", source) for n in ("to_k", "to_v")),
        )
        return self.linear(f"{p}.to_out.0", softmax_attention(q, k, v, self.heads))

    # ---- layers ----------------------------------------------------------------------------------------------------

    def linear(self, p: str, x: Tensor) -> Tensor:
        weight = self.w[f"{p}.weight"]
        y = x @ weight.reshape(weight.shape[:2]).T  # a 1x1 convolution is one
        return y + self.w[f"{p}.bias"] if f"{p}.bias" in self.w else y

    def conv(self, p: str, x: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
        frames = [
            F.conv2d(frame, self.w[f"{p}.weight"], self.w[f"{p}.bias"], stride=stride, padding=padding)
            for frame in x.unbind(1)
        ]
        return torch.stack(frames, dim=1)

    def group_norm(self, p: str, x: Tensor, eps: float, over_frames: bool) -> Tensor:
        g = rearrange(x, "b f (g c) h w -> b f g c h w", g=self.groups)
        axes = (1, 3, 4, 5) if over_frames else (3, 4, 5)
        variance, mean = torch.var_mean(g, dim=axes, keepdim=True, correction=0)
        y = rearrange((g - mean) / (variance + eps).sqrt(), "b f g c h w -> b f (g c) h w")
        return y * self.w[f"{p}.weight"][:, None, None] + self.w[f"{p}.bias"][:, None, None]

    def layer_norm(self, p: str, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=0)
        return (x - mean) / (variance + 1e-5).sqrt() * self.w[f"{p}.weight"] + self.w[f"{p}.bias"]

    def time_embedding(self, t: Tensor) -> Tensor:
        """The sinusoid is a float32 table, as upstream's is."""
        half = self.w["time_embedding.linear_1.weight"].shape[1] // 2
        frequency = torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float32) / half)
        angle = t.float()[:, None] * frequency
        y = self.linear("time_embedding.linear_1", torch.cat([angle.cos(), angle.sin()], dim=1).double())
        return self.linear("time_embedding.linear_2", F.silu(y))
