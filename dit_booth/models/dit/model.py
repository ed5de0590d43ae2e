"""The video DiT: a diffusion transformer (Peebles & Xie) with cross-frame attention by plan and temporal attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FrameCache, FrameIndices, FramePlan
from dit_booth.inject import BlockGroup, Injection, Latents, Modulation, Residuals, Site, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.blocks import BlockModulation, DiTBlock, DiTInputs, TokenConv
from dit_booth.models.dit.config import SIZES, DiTConfig
from dit_booth.models.frames import FrameLayout, beside, make_frame_cache
from dit_booth.models.layers import (
    compile_each,
    frame_timesteps,
    name_linear_sites,
    timestep_embedding,
    with_context_frames,
)
from dit_booth.models.modulation import ShiftScaleGate
from dit_booth.models.positions import (
    ImageRotary,
    frame_embedding,
    grid_embedding,
    image_position,
    rotary_3d,
    rotary_frames,
)

__all__ = ["SIZES", "DiTConfig", "VideoDiT"]


class VideoDiT(nn.Module):
    """x (b f c h w) at timestep t in [0, 1000) with text, or class labels (b,) -> prediction (b f c h w).

    t is one of each video (b,), or of each of its frames (b f).

    Frames are free in number, height and width if the patch divides them. By default, timestep and pooled text
    modulate every block through adaLN-Zero (DiT section 3.2) and no attention reads the text; see `DiTConfig`.
    `out_channels`: channels of the prediction, if not those of x (DiT's own weights also predict a variance).
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
        self.temporal_plan = None if config.temporal_plan == "all" else FramePlan(config.temporal_plan)
        # Latte adds frame positions before its first temporal block (golden), the other layouts at the entry.
        self.frame_embedding_block = (
            1 if (config.layout, config.positions) == ("interleaved", "sincos") else None
        )
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
        self.entry = Site(
            name="latents.entry", port="latents", role="entry", dim=channels, embed=self.x_embedder.proj
        )
        self.exit = Site(name="latents.exit", port="latents", role="exit", dim=out_channels)
        name_linear_sites(self)
        self.residual = Site(
            name="x_embedder", port="residual", role="blocks", dim=hidden, groups=self.groups(depth, hidden)
        )
        self.initialise()

    def forward(self, x: Tensor, t: Tensor, text: Text | Tensor, inject: Injection = no_injection) -> Tensor:
        latents = inject(self.entry, Latents(x, clip=inject.clip))
        height, width = latents.x.shape[-2:]
        frames = FrameLayout.build(latents, self.plan, self.temporal_plan)
        by_frame = frame_timesteps(t, latents.x.shape[1] - latents.context, latents.context)
        t_emb = self.t_embedder(by_frame, x.dtype)  # (f) b d
        c = self.conditioning_vector(t_emb, text, inject)  # (f) b d
        shared = self.build_inputs(c, latents, frames)
        x = self.x_embedder(latents.x, frames.positions, latents.added)  # b f n d
        tokens = self.text_tokens(text)  # b 1 l d
        run = partial(self.run_copies, latents=latents, c=c, tokens=tokens)
        added = inject(self.residual, Residuals(x, latents.x, run)).added
        for i, block in enumerate(self.blocks):
            if i == self.frame_embedding_block:
                x = x + frame_embedding(frames.positions, x.shape[-1], x.device).to(x.dtype)
            x, tokens = self.run_block(i, block, x, tokens, shared, inject.inside(f"blocks.{i}"))
            x = x + added[i] if i in added else x
        x = self.final_layer(x, c if self.config.head_text else t_emb, height, width)
        return inject(self.exit, replace(latents, x=x)).x

    def conditioning_vector(self, t_emb: Tensor, text: Text | Tensor, inject: Injection) -> Tensor:
        """Add the pooled text or the label, where they modulate the blocks, to the timestep embedding: (f) b d."""
        if self.text_site is not None:
            assert isinstance(text, Text)
            pooled = Modulation(self.text_embedder(text.pooled), text.pooled)
            return t_emb + inject(self.text_site, pooled).vector
        if self.config.conditioning == "class_label":
            label: Tensor = self.y_embedder(text)
            return t_emb + label
        return t_emb

    def text_tokens(self, text: Text | Tensor) -> Tensor | None:
        """Embed the text tokens as one group of keys (b 1 l c); None if the blocks read no text."""
        if self.config.conditioning not in ("in_context", "cross_attention"):
            return None
        assert isinstance(text, Text)
        embed = self.context_embedder if self.config.conditioning == "in_context" else nn.Identity()
        tokens: Tensor = embed(text.tokens)
        return rearrange(tokens, "b l c -> b 1 l c")

    def build_inputs(self, c: Tensor, latents: Latents, frames: FrameLayout) -> DiTInputs:
        """Build the inputs that all blocks share."""
        x, context = latents.x, latents.context
        height, width = (n // self.config.patch for n in x.shape[-2:])
        shared = DiTInputs(
            c,
            frames.plan,
            frames.temporal_plan,
            grid=(height, width),
            isolated=context if latents.one_way else 0,
        )
        riflex = frames.clip.riflex
        if self.config.positions == "sincos":
            if riflex is not None:
                raise ValueError(
                    "sample.long.riflex changes rotary frequencies, but dit.positions is sincos; use a model with"
                    " dit.positions rotary, or set sample.long.riflex to 0"
                )
            return shared
        dim = self.config.shape.hidden // self.config.shape.heads
        grid = (height, width, dim, x.device, x.dtype, riflex)
        own = image_position(frames.positions, context)
        rotary, image = rotary_3d(frames.positions, *grid), ImageRotary.build(own, min(0, own), *grid)
        per_frame = frames.temporal_plan is not None
        temporal = rotary_frames(
            frames.positions, dim, x.device, x.dtype, group_per_frame=per_frame, riflex=riflex
        )
        return shared._replace(rotary=rotary, image_rotary=image, temporal_rotary=temporal)

    def make_frame_cache(self) -> FrameCache:
        """Return an empty cache of past frames, for one noise level. ValueError: a plan or text reads later frames."""
        if self.config.conditioning == "in_context":
            raise ValueError(
                "dit.conditioning is in_context: the text reads every frame, so past frames would change with later"
                " ones; sample without a cache, or use adaln_zero, adaln or cross_attention"
            )
        return make_frame_cache(self.sites(), self.plan, self.temporal_plan)

    def run_block(
        self, i: int, block: nn.Module, x: Tensor, tokens: Tensor | None, shared: DiTInputs, inject: Injection
    ) -> tuple[Tensor, Tensor | None]:
        """Run block i; with checkpointing, recompute it in the backward pass."""
        recomputed = self.config.checkpointing and i % self.config.checkpoint_every == 0
        out: tuple[Tensor, Tensor | None]
        if recomputed and torch.is_grad_enabled():
            out = checkpoint(block, x, tokens, shared, inject, use_reentrant=False)
        else:
            out = block(x, tokens, shared, inject)
        return out

    def run_copies(
        self,
        copies: Mapping[int, nn.Module],
        x: Tensor,
        *,
        latents: Latents,
        c: Tensor,
        tokens: Tensor | None,
    ) -> dict[int, Tensor]:
        """Run copies of blocks on x with r reference frames before it (`Residuals.run`)."""
        references = x.shape[1] - latents.x.shape[1]
        side = beside(latents, references)
        frames = FrameLayout.build(side, self.plan, self.temporal_plan)
        shared = self.build_inputs(with_context_frames(c, references), side, frames)
        own = self.x_embedder.add_positions(x[:, :references], shared.grid, frames.positions[:references])
        x = torch.cat([own, x[:, references:]], dim=1)
        outputs: dict[int, Tensor] = {}
        for i, block in copies.items():
            if i == self.frame_embedding_block:
                x = x + frame_embedding(frames.positions, x.shape[-1], x.device).to(x.dtype)
            x, tokens = self.run_block(i, block, x, tokens, shared, no_injection)
            outputs[i] = x
        return outputs

    def groups(self, depth: int, hidden: int) -> tuple[BlockGroup, ...]:
        """Return the blocks that can be copied: each by itself or, where space and time alternate, in pairs."""
        size = 2 if self.config.layout == "interleaved" else 1
        numbers = [range(i, min(i + size, depth)) for i in range(0, depth, size)]
        return tuple(BlockGroup({i: self.blocks[i] for i in group}, {group[-1]: hidden}) for group in numbers)

    def compile_blocks(self, **options: object) -> None:
        """Compile each block with torch.compile (`compile_each`)."""
        compile_each(self.blocks, **options)

    def sites(self) -> list[Site]:
        """Return every site of the backbone, in the order of the forward pass."""
        blocks = [site for block in self.blocks if isinstance(block, DiTBlock) for site in block.sites()]
        text = [self.text_site] if self.text_site else []
        return [self.entry, *text, self.residual, *blocks, self.exit]

    def initialise(self) -> None:
        """Initialise as DiT: Xavier-uniform layers, zero gates and a zero output."""
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
            elif isinstance(module, DiTBlock):  # attn2 has no gate
                zeroed = module.attn2 and module.attn2.to_out
            elif isinstance(module, TokenConv):
                zeroed = module
            elif isinstance(module, FinalLayer):
                zeroed = nn.ModuleList([module.linear, module.adaLN_modulation])
            for parameter in zeroed.parameters() if zeroed is not None else ():
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def scale_residual_layers(self) -> None:
        """Divide each layer that adds to the residual stream by the square root of their count (GPT-2, 2.3)."""
        last = [
            layer
            for name, layer in self.blocks.named_modules()
            if isinstance(layer, nn.Linear) and name.endswith(("to_out", "mlp.2", "mlp.down"))
        ]
        for layer in last:
            layer.weight.div_(len(last) ** 0.5)


class PatchEmbed(nn.Module):
    """Embed latent patches as tokens (b f n d), with the fixed positions that the layout adds at the entry.

    Frame positions are added here unless the layout is Latte's, which adds them later, or frames never interact.
    """

    def __init__(self, channels: int, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, config.shape.hidden, config.patch, config.patch)
        self.patch, self.sincos = config.patch, config.positions == "sincos"
        self.with_frames = config.layout in ("factorised", "joint")

    def forward(
        self, x: Tensor, frame_positions: FrameIndices | None = None, added: Tensor | None = None
    ) -> Tensor:
        """Latents (b f c h w), frames at `frame_positions` (default: from 0) -> tokens (b f n d).

        added: b f d h w, of the tokens' grid, to add to the embedded patches.
        """
        frames, height, width = x.shape[1], x.shape[-2], x.shape[-1]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latents of {height} x {width} cannot be cut into patches of {self.patch};"
                " change dit.patch or data.size"
            )
        tokens: Tensor = self.proj(rearrange(x, "b f c h w -> (b f) c h w"))
        if added is not None:
            tokens = tokens + rearrange(added, "b f d h w -> (b f) d h w")
        grid = height // self.patch, width // self.patch
        # The convolution's layout is channels first; without this copy every norm would copy.
        tokens = rearrange(tokens, "(b f) d h w -> b f (h w) d", f=frames).contiguous()
        return self.add_positions(tokens, grid, frame_positions or range(frames))

    def add_positions(self, tokens: Tensor, grid: tuple[int, int], frames: FrameIndices) -> Tensor:
        """Add the fixed positions of tokens (b f n d) of frames at these positions, if the DiT has fixed ones."""
        if not self.sincos:
            return tokens
        at = frames if self.with_frames else None
        return tokens + grid_embedding(*grid, tokens.shape[-1], tokens.device, at).to(tokens.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of t through two layers: (...) -> (... d)."""

    def __init__(self, hidden: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        t_emb: Tensor = self.mlp(timestep_embedding(t, self.features).to(dtype))
        return t_emb


class LabelEmbedder(nn.Module):
    """Embedding of class labels; the last row is the null class of guidance."""

    def __init__(self, classes: int, hidden: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, hidden)

    def forward(self, label: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(label)
        return embedded


class FinalLayer(nn.Module):
    """Modulated norm and projection of tokens back to latents."""

    def __init__(self, hidden: int, channels: int, patch: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.patch = patch

    def forward(self, x: Tensor, c: Tensor, height: int, width: int) -> Tensor:
        (mod,) = ShiftScaleGate.split(self.adaLN_modulation(c), 1, 2)
        x = self.linear(mod.modulate(self.norm_final(x)))
        p = self.patch
        return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", p=p, q=p, h=height // p, w=width // p)
