"""The video DiT: a diffusion transformer (Peebles & Xie) with cross-frame attention by plan and temporal attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FramePlan
from dit_booth.attention.plans import seen_by_all, with_context
from dit_booth.inject import Injection, Latents, Modulation, Site, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.blocks import BlockModulation, DiTBlock, Modulate, Step, TokenConv
from dit_booth.models.dit.config import SIZES, DiTConfig
from dit_booth.models.layers import allow_einops_in_graph, timestep_embedding
from dit_booth.models.positions import grid_embedding, rotary_3d, rotary_time, time_embedding

__all__ = ["SIZES", "DiTConfig", "VideoDiT"]


class VideoDiT(nn.Module):
    """x (b f c h w) at timestep t (b,) in [0, 1000) with text, or class labels (b,) -> prediction (b f c h w).

    Any number of frames, any height and width that the patch divides. By default time and pooled text modulate every
    block through adaLN-Zero (DiT section 3.2) and there is no attention to the text; `DiTConfig` has the other ways.
    `out_channels`: of the prediction, where they are not those of x (DiT's own weights predict a variance, too).
    """

    def __init__(
        self,
        config: DiTConfig,
        *,
        channels: int,
        text_dim: int,
        text_embed_dim: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        depth, hidden, _ = config.shape
        out_channels = out_channels or channels
        self.config, self.plan = config, FramePlan(config.plan)
        # Latte adds the frames' positions before its first block of time (golden), the others at the entry.
        self.time_enters = 1 if (config.layout, config.positions) == ("interleaved", "sincos") else None
        self.x_embedder = PatchEmbed(channels, config)
        self.t_embedder = TimestepEmbedder(hidden)
        self.text_site: Site | None = None
        if config.conditioning in ("adaln_zero", "adaln"):
            self.text_embedder = nn.Linear(text_embed_dim, hidden)
            self.text_site = Site(
                name="text_embedder",
                port="modulation",
                role="text",
                dim=hidden,
                projections={"projection": self.text_embedder},
            )
        elif config.conditioning == "in_context":
            self.context_embedder = nn.Linear(text_dim, hidden)
        elif config.conditioning == "class_label":
            self.y_embedder = LabelEmbedder(config.classes, hidden)
        self.blocks = nn.ModuleList(
            DiTBlock(f"blocks.{i}", config, config.parts(i), text_dim) for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden, out_channels, config.patch)
        self.entry = Site(name="latents.entry", port="latents", role="entry", dim=channels)
        self.exit = Site(name="latents.exit", port="latents", role="exit", dim=out_channels)
        self.initialise()

    def forward(self, x: Tensor, t: Tensor, text: Text | Tensor, inject: Injection = no_injection) -> Tensor:
        latents = inject(self.entry, Latents(x))
        height, width = latents.x.shape[-2:]
        times = range(-latents.context, latents.x.shape[1] - latents.context)
        time = self.t_embedder(t, x.dtype)  # b d
        c = self.condition(time, text, inject)  # b d
        step = self.step(c, latents, times)
        x, tokens = self.x_embedder(latents.x, times), self.tokens(text)  # b f n d; b 1 l d
        for i, block in enumerate(self.blocks):
            if i == self.time_enters:
                x = x + time_embedding(times, x.shape[-1], x.device).to(x.dtype)
            x, tokens = self.run(i, block, x, tokens, step, inject.inside(f"blocks.{i}"))
        x = self.final_layer(x, c if self.config.head_text else time, height, width)
        return inject(self.exit, replace(latents, x=x)).x

    def condition(self, time: Tensor, text: Text | Tensor, inject: Injection) -> Tensor:
        """What modulates the blocks (b d): the time, with the pooled text or the label where they enter so."""
        if self.text_site is not None:
            assert isinstance(text, Text)
            pooled = Modulation(self.text_embedder(text.pooled), text.pooled)
            return time + inject(self.text_site, pooled).vector
        if self.config.conditioning == "class_label":
            return time + self.y_embedder(text)
        return time

    def tokens(self, text: Text | Tensor) -> Tensor | None:
        """Text tokens as a group of keys (b 1 l c), where the blocks read them."""
        if self.config.conditioning not in ("in_context", "cross_attention"):
            return None
        assert isinstance(text, Text)
        embed = self.context_embedder if self.config.conditioning == "in_context" else nn.Identity()
        return rearrange(embed(text.tokens), "b l c -> b 1 l c")

    def step(self, c: Tensor, latents: Latents, times: range) -> Step:
        """What all blocks read in one pass; `times` are the frames' positions, before 0 those of a context."""
        x, context = latents.x, latents.context
        plan, time_plan = self.plan.frames(len(times) - context), None
        closed = context if latents.one_way else 0
        if context:
            plan = with_context(plan, context, latents.one_way)
            if latents.one_way:
                time_plan = with_context(
                    seen_by_all(len(times) - context, len(times) - context), context, True
                )
        height, width = (n // self.config.patch for n in x.shape[-2:])
        step = Step(c, plan, time_plan, grid=(height, width), closed=closed)
        if self.config.positions == "sincos":
            return step
        dim = self.config.shape.hidden // self.config.shape.heads
        space = rotary_3d(times, height, width, dim, x.device, x.dtype)
        time = rotary_time(times, dim, x.device, x.dtype, apart=time_plan is not None)
        return step._replace(space=space, time=time)

    def run(
        self, i: int, block: nn.Module, x: Tensor, tokens: Tensor | None, step: Step, inject: Injection
    ) -> tuple[Tensor, Tensor | None]:
        """Block i, recomputed in the backward pass where the configuration says so."""
        recomputed = self.config.checkpointing and i % self.config.checkpoint_every == 0
        if recomputed and torch.is_grad_enabled():
            return checkpoint(block, x, tokens, step, inject, use_reentrant=False)
        return block(x, tokens, step, inject)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile each block; equal blocks share their code, so this costs about one block's compilation.

        The options are torch.compile's. Names of parameters stay.
        """
        # A tap that reads its own site's name is compiled anew for each block: leave room for that.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * len(self.blocks))
        allow_einops_in_graph()
        for block in self.blocks:
            block.compile(**{"fullgraph": True, "dynamic": False, **options})

    def sites(self) -> list[Site]:
        """Every site of the backbone, in the order of the forward pass."""
        blocks = [site for block in self.blocks if isinstance(block, DiTBlock) for site in block.sites()]
        text = [self.text_site] if self.text_site else []
        return [self.entry, *text, *blocks, self.exit]

    def initialise(self) -> None:
        """DiT's initialisation: Xavier-uniform layers, zero gates and a zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        for name, module in self.named_children():
            if name.endswith("embedder") and name != "x_embedder":
                for small in module.modules():
                    if isinstance(small, nn.Linear | nn.Embedding):
                        nn.init.normal_(small.weight, std=0.02)
        if self.config.init == "depth_scaled":
            self.scale_residual_layers()
        for module in self.modules():
            zeroed: nn.Module | None = None
            if isinstance(module, BlockModulation):
                zeroed = module.linear
            elif isinstance(module, DiTBlock):  # it has no gate to start it at zero
                zeroed = module.attn2 and module.attn2.to_out
            elif isinstance(module, TokenConv):
                zeroed = module
            elif isinstance(module, FinalLayer):
                zeroed = nn.ModuleList([module.linear, module.adaLN_modulation])
            for parameter in zeroed.parameters() if zeroed is not None else ():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def scale_residual_layers(self) -> None:
        """Each layer that adds to the residual stream, divided by the square root of their number (GPT-2, 2.3)."""
        last = [
            layer
            for name, layer in self.blocks.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(("to_out", "mlp.2", "mlp.down"))
        ]
        for layer in last:
            layer.weight.div_(len(last) ** 0.5)


class PatchEmbed(nn.Module):
    """Latent patches to tokens (b f n d), with the fixed positions that the layout adds at the entry.

    Latte adds the frames' positions before its first temporal block only (golden); frames that never meet need none.
    """

    def __init__(self, channels: int, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, config.shape.hidden, config.patch, config.patch)
        self.patch, self.sincos = config.patch, config.positions == "sincos"
        self.with_time = config.layout in ("factorised", "joint")

    def forward(self, x: Tensor, times: range | None = None) -> Tensor:
        """x (b f c h w), its frames at `times` (from 0) -> b f n d."""
        frames, height, width = x.shape[1], x.shape[-2], x.shape[-1]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latents of {height} x {width} cannot be cut into patches of {self.patch};"
                " change dit.patch or data.size"
            )
        tokens = self.proj(rearrange(x, "b f c h w -> (b f) c h w"))
        rows, columns, hidden = height // self.patch, width // self.patch, tokens.shape[1]
        # The convolution leaves channels first; the stream would keep that layout, and every norm would copy it.
        tokens = rearrange(tokens, "(b f) d h w -> b f (h w) d", f=frames).contiguous()
        if not self.sincos:
            return tokens
        times = (times or range(frames)) if self.with_time else None
        return tokens + grid_embedding(rows, columns, hidden, x.device, times).to(tokens.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of t through two layers."""

    def __init__(self, hidden: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_embedding(t, self.features).to(dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class, and one more for the null class of guidance."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class FinalLayer(nn.Module):
    """Modulated norm, then tokens back to latents."""

    def __init__(self, hidden: int, channels: int, patch: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.patch = patch

    def forward(self, x: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        shift, scale = rearrange(self.adaLN_modulation(c), "b (p d) -> p b 1 1 d", p=2)
        x = self.linear(Modulate(shift, scale).of(self.norm_final(x)))
        p = self.patch
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)
