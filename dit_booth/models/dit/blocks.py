"""A block of the video DiT: attention over frames, to the text, along time, and an MLP, each modulated by name."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from dit_booth.attention import Frames
from dit_booth.attention.plans import seen_by_all
from dit_booth.inject import Injection, Modulation, Role, Site
from dit_booth.models.dit.config import DiTConfig
from dit_booth.models.layers import Attention, Linear
from dit_booth.models.modulation import ShiftScaleGate
from dit_booth.models.positions import ImageRotary, Rotary


class DiTInputs(NamedTuple):
    """Inputs that all blocks of one forward pass share."""

    c: Tensor  # (f) b d, conditioning vector: the timestep embedding, with the text or label where they modulate
    plan: Frames  # of attn1
    temporal_plan: Frames | None = None  # of attn_temp; none: every frame reads every frame
    rotary: Rotary | None = None  # of attn1
    image_rotary: ImageRotary | None = None  # of attn1, for a reference's keys
    temporal_rotary: Rotary | None = None  # of attn_temp
    grid: tuple[int, int] = (0, 0)  # rows and columns of a frame's tokens
    isolated: int = 0  # leading frames that must not see the video, nor text that has seen it


# ---- modulation --------------------------------------------------------------------------------------------


class BlockModulation(nn.Module):
    """Compute a block's adaLN vector, pass it through the `modulation` port, and split it by sub-layer.

    Each sub-layer gets a shift, a scale and, unless `gated` is false, a gate: DiT's adaLN-Zero and adaLN (section 3.2).
    """

    def __init__(self, name: str, hidden: int, parts: tuple[str, ...], gated: bool = True) -> None:
        super().__init__()
        self.parts, self.each = parts, 3 if gated else 2
        width = len(parts) * self.each * hidden
        self.linear = nn.Linear(hidden, width)
        self.site = Site(
            name=name, port="modulation", role="block", dim=width, projections={"linear": self.linear}
        )

    def forward(self, c: Tensor, inject: Injection) -> dict[str, ShiftScaleGate]:
        c = nn.functional.silu(c)
        vector = inject(self.site, Modulation(self.linear(c), c)).vector
        return dict(zip(self.parts, ShiftScaleGate.split(vector, len(self.parts), self.each), strict=True))


# ---- convolution -------------------------------------------------------------------------------------------


class TokenConv(nn.Conv2d):
    """``x + conv(x)``, depth-wise over the grid of a frame's tokens (CPVT, arXiv 2102.10882). x: (b f n d)."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, hidden, 3, padding=1, groups=hidden)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        frames = rearrange(x, "b f (h w) d -> (b f) d h w", h=grid[0], w=grid[1])
        return x + rearrange(super().forward(frames), "(b f) d h w -> b f (h w) d", b=len(x))


# ---- MLPs --------------------------------------------------------------------------------------------------


class MLP(nn.Sequential):
    """Two layers of width 4 d around a GELU."""

    def __init__(self, hidden: int) -> None:
        super().__init__(Linear(hidden, 4 * hidden), nn.GELU("tanh"), Linear(4 * hidden, hidden))

    def forward(self, x: Tensor, inject: Injection) -> Tensor:  # type: ignore[override]
        up, gelu, down = self
        y: Tensor = down(gelu(up(x, inject)), inject)
        return y


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, as many parameters as two layers of width 4 d (Shazeer, arXiv 2002.05202)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = (8 * hidden // 3 + 7) // 8 * 8
        self.gate, self.up = Linear(hidden, inner), Linear(hidden, inner)
        self.down = Linear(inner, hidden)

    def forward(self, x: Tensor, inject: Injection) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x, inject)) * self.up(x, inject), inject)
        return y


def build_mlp(kind: str, hidden: int) -> nn.Module:
    return SwiGLU(hidden) if kind == "swiglu" else MLP(hidden)


# ---- the block ---------------------------------------------------------------------------------------------


class DiTBlock(nn.Module):
    """Cross-frame attention by plan, text and temporal attention, a convolution (those that `config` asks for), an MLP.

    x: (b f n d). text: None, or (b 1 l c): tokens for `attn2` to read, or (in context) tokens that take part in
    `attn1` and come out transformed.
    """

    def __init__(self, name: str, config: DiTConfig, parts: tuple[str, ...], text_dim: int) -> None:
        super().__init__()
        hidden, kind = config.shape.hidden, config.conditioning

        def attention(leaf: str, role: Role, source_dim: int = hidden) -> Attention:
            return Attention(
                f"{name}.{leaf}",
                role,
                hidden,
                config.shape.heads,
                source_dim,
                bias=True,
                kernel=config.attention,
                qk_norm=config.qk_norm,
                rotary=config.positions == "rotary",
            )

        reads_text = kind == "cross_attention" and "attn1" in parts
        self.in_context = kind == "in_context" and "attn1" in parts
        self.modulation = BlockModulation(f"{name}.modulation", hidden, parts, gated=kind != "adaln")
        self.attn1 = attention("attn1", "cross_frame") if "attn1" in parts else None
        self.attn2 = attention("attn2", "text", text_dim) if reads_text else None
        self.attn_temp = attention("attn_temp", "temporal") if "attn_temp" in parts else None
        self.conv = TokenConv(hidden) if config.conv else None
        self.mlp = build_mlp(config.mlp, hidden)
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)

    def forward(
        self, x: Tensor, text: Tensor | None, shared: DiTInputs, inject: Injection
    ) -> tuple[Tensor, Tensor | None]:
        mod = self.modulation(shared.c, inject)
        if self.attn1 is not None:
            x, text = self.attend_across_frames(self.attn1, mod["attn1"], x, text, shared, inject)
        if self.attn2 is not None and text is not None:
            x = x + self.attn2(self.norm(x), text, seen_by_all(x.shape[1]), inject)
        if self.attn_temp is not None:
            x = self.attend_over_time(self.attn_temp, mod["attn_temp"], x, shared, inject)
        if self.conv is not None:
            x = self.conv(x, shared.grid)
        x = mod["mlp"].add_residual(x, self.mlp(mod["mlp"].modulate(self.norm(x)), inject))
        if self.in_context and text is not None:
            own = mod["mlp"].of_frame_0
            text = own.add_residual(text, self.mlp(own.modulate(self.norm(text)), inject))
        return x, text

    def attend_across_frames(
        self,
        attention: Attention,
        mod: ShiftScaleGate,
        x: Tensor,
        text: Tensor | None,
        shared: DiTInputs,
        inject: Injection,
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-frame attention. In context, every frame reads the text, and the text reads itself and all frames."""
        h = mod.modulate(self.norm(x))
        if not self.in_context or text is None:
            return mod.add_residual(
                x, attention(h, h, shared.plan, inject, shared.rotary, shared.image_rotary)
            ), text
        own, frames = mod.of_frame_0, x.shape[1]
        g = own.modulate(self.norm(text))
        words = attention.project(g, g, seen_by_all(1), inject)
        qkv = attention.project(h, h, shared.plan, inject, shared.rotary, shared.image_rotary)
        readers = ((),) * shared.isolated + seen_by_all(frames - shared.isolated)
        qkv = inject(attention.site, qkv.reading(replace(words.segments[0], frames=readers)))
        words = words.reading(replace(qkv.segments[0], frames=seen_by_all(1, frames)))
        seen, said = attention.read(qkv, inject), attention.read(words, inject)
        return mod.add_residual(x, seen), own.add_residual(text, said)

    def attend_over_time(
        self, attention: Attention, mod: ShiftScaleGate, x: Tensor, shared: DiTInputs, inject: Injection
    ) -> Tensor:
        """Temporal attention: the frames of one place are one group of keys or, under a plan, one group each."""
        form = "b f n d -> (b n) 1 f d" if shared.temporal_plan is None else "b f n d -> (b n) f 1 d"
        h = rearrange(mod.modulate(self.norm(x)), form).contiguous()  # one copy, not one per projection
        h = attention(h, h, shared.temporal_plan or seen_by_all(1), inject, shared.temporal_rotary)
        return mod.add_residual(x, rearrange(h, "(b n) g f d -> b (g f) n d", b=len(x)))

    def sites(self) -> list[Site]:
        """Return the block's sites, in the order of the forward pass."""
        attentions = (a for a in (self.attn1, self.attn2, self.attn_temp) if a is not None)
        return [self.modulation.site, *(a.site for a in attentions)]
