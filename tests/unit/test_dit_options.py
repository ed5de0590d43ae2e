"""The DiT's options: layouts, conditioning, norms; each against a plain computation or a property."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from spies import Spy, tapped, worst
from torch import Tensor, nn

from dit_booth.attention.plans import with_context
from dit_booth.inject import Injection, Latents, Modulation, no_injection
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.blocks import DiTBlock, DiTInputs, SwiGLU, TokenConv
from dit_booth.models.dit.model import DiTConfig, VideoDiT

torch.set_num_threads(1)
F64 = torch.float64
SHAPE: dict[str, Any] = {"depth": 3, "hidden": 32, "heads": 4}
BASE = DiTConfig(**SHAPE)
CONFIGS = {
    "factorised": BASE,
    "interleaved": replace(BASE, layout="interleaved"),
    "joint": replace(BASE, layout="joint", plan="all"),
    "image": replace(BASE, layout="image", plan="self"),
    "adaln": replace(BASE, conditioning="adaln"),
    "in_context": replace(BASE, conditioning="in_context"),
    "in_context interleaved": replace(BASE, conditioning="in_context", layout="interleaved"),
    "cross_attention": replace(BASE, conditioning="cross_attention"),
    "class_label": replace(BASE, conditioning="class_label", classes=3),
    "rotary": replace(BASE, positions="rotary"),
    "rotary interleaved": replace(BASE, positions="rotary", layout="interleaved"),
    "rotary joint": replace(BASE, positions="rotary", layout="joint", plan="all"),
    "qk_norm": replace(BASE, qk_norm=True),
    "swiglu": replace(BASE, mlp="swiglu"),
    "conv": replace(BASE, conv=True),
    "head by time": replace(BASE, head_text=False),
    "everything": replace(
        BASE,
        positions="rotary",
        qk_norm=True,
        mlp="swiglu",
        conv=True,
        conditioning="cross_attention",
        init="depth_scaled",
    ),
}
EVERY = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config: DiTConfig, *, random: bool = True) -> VideoDiT:
    torch.manual_seed(0)
    dit = VideoDiT(config, channels=3, text_dim=8, text_embed_dim=6).double()
    if random:
        for parameter in dit.parameters():
            parameter.data.normal_(std=0.15)
    return dit


def inputs(config: DiTConfig, b: int = 2, f: int = 3, h: int = 4, w: int = 6) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    x, tokens, pooled = (
        torch.randn(*shape, generator=generator, dtype=F64) for shape in ((b, f, 3, h, w), (b, 5, 8), (b, 6))
    )
    text = torch.arange(b) if config.conditioning == "class_label" else Text(tokens, pooled)
    return x, torch.linspace(7.5, 640.0, b), text


def rows(text: Any, row: slice) -> Any:
    return text[row] if isinstance(text, Tensor) else Text(text.tokens[row], text.pooled[row])


# ---- what holds for all ------------------------------------------------------------------------------------


@EVERY
def test_it_starts_at_zero_and_gradients_reach_every_parameter(config: DiTConfig) -> None:
    args = inputs(config)
    assert not build(config, random=False)(*args).any()
    dit = build(config)
    dit(*args).square().sum().backward()
    unreached = {name for name, p in dit.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert unreached == set()


@EVERY
@torch.no_grad()
def test_any_size_and_length_runs_and_rows_are_independent(config: DiTConfig) -> None:
    dit = build(config)
    for f, h, w in ((1, 2, 2), (5, 8, 4)):
        x, t, text = inputs(config, f=f, h=h, w=w)
        out = dit(x, t, text)
        assert out.shape == x.shape and out.isfinite().all()
        for i in range(2):
            row = slice(i, i + 1)
            assert worst(out[row], dit(x[row], t[row], rows(text, row))) < 1e-10


@EVERY
@torch.no_grad()
def test_with_and_without_gradients_it_computes_the_same(config: DiTConfig) -> None:
    """Without gradients, norms' outputs are overwritten."""
    dit, (x, t, text) = build(config), inputs(config)
    kept = x.clone()
    plain = dit(x, t, text)
    with torch.enable_grad():
        assert torch.equal(dit(x, t, text), plain)
    assert torch.equal(x, kept)


@EVERY
@torch.no_grad()
def test_sites_are_the_modules_in_the_order_of_the_forward_pass(config: DiTConfig) -> None:
    dit, order = build(config), []

    class Order(Injection):
        def __call__(self, site, payload):  # type: ignore[no-untyped-def]
            if site.port != "linear":
                order.append(site.name)
            return payload

    plain = dit(*inputs(config), Order({}))
    sites = dit.sites()
    assert order == [site.name for site in sites]
    for site in sites:
        if site.port != "latents":
            assert dit.get_submodule(site.name) is not None
        if site.port == "modulation":
            spy = Spy()
            assert torch.equal(dit(*inputs(config), tapped([site], spy)), plain)
            assert spy.seen[0].vector.shape == (2, site.dim)
    every = {site.name: [(Spy(1.5), None)] for site in sites}
    for name, taps in every.items():
        assert worst(dit(*inputs(config), Injection({name: taps})), plain) > 1e-9, name


@EVERY
def test_checkpointing_gives_equal_gradients(config: DiTConfig) -> None:
    args, gradients = inputs(config), []
    for options in ({}, {"checkpointing": True}, {"checkpointing": True, "checkpoint_every": 2}):
        dit, count = build(replace(config, **options)), Counter()  # type: ignore[var-annotated]
        for i, block in enumerate(dit.blocks):
            block.register_forward_pre_hook(lambda *_, i=i, count=count: count.update([i]))
        gradients.append(torch.autograd.grad(dit(*args).square().sum(), list(dit.parameters())))
        every = {0: 0, 1: 1, 2: 2}[len(options)]
        assert [count[i] for i in range(3)] == [1 + (every > 0 and i % every == 0) for i in range(3)]
    for other in gradients[1:]:
        assert all(
            worst(a, b) <= 1e-12 * max(1, a.abs().max().item())
            for a, b in zip(gradients[0], other, strict=True)
        )


# ---- layouts -----------------------------------------------------------------------------------------------


def test_blocks_have_the_attentions_of_the_layout() -> None:
    def kinds(config: DiTConfig) -> list[str]:
        return [
            "+".join(part for part in ("attn1", "attn2", "attn_temp") if getattr(block, part) is not None)
            for block in build(config).blocks
        ]

    assert kinds(BASE) == ["attn1+attn_temp"] * 3
    assert kinds(CONFIGS["interleaved"]) == ["attn1", "attn_temp", "attn1"]
    assert kinds(CONFIGS["joint"]) == kinds(CONFIGS["image"]) == ["attn1"] * 3
    both = replace(CONFIGS["interleaved"], conditioning="cross_attention")
    assert kinds(both) == ["attn1+attn2", "attn_temp", "attn1+attn2"]


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@torch.no_grad()
def test_joint_attention_joins_all_frames_and_image_none(positions: Any) -> None:
    x, t, text = inputs(BASE, f=4)
    moved = x.clone()
    moved[:, 2] *= -1
    for layout, felt in (("joint", {0, 1, 2, 3}), ("image", {2})):
        dit = build(replace(CONFIGS[layout], positions=positions))
        moves = (dit(moved, t, text) - dit(x, t, text)).abs().amax((0, 2, 3, 4))
        assert {i for i in range(4) if moves[i] > 1e-9} == felt
    frames = build(CONFIGS["image"])
    alone = torch.cat([frames(x[:, i : i + 1], t, text) for i in range(4)], dim=1)
    assert worst(frames(x, t, text), alone) < 1e-10, "every frame is an image"


@pytest.mark.parametrize("name", ["factorised", "interleaved", "joint", "rotary", "rotary joint"])
@torch.no_grad()
def test_frames_and_places_are_told_apart(name: str) -> None:
    config = replace(CONFIGS[name], plan="all", patch=1)
    dit, (x, t, text) = build(config), inputs(config)
    out = dit(x, t, text)
    for axis in (1, 3, 4):
        assert worst(dit(x.flip(axis), t, text).flip(axis), out) > 1e-3


# ---- conditioning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_text_enters_where_the_conditioning_says(name: str) -> None:
    config = CONFIGS[name]
    if config.conditioning == "class_label":
        return
    dit, (x, t, text) = build(config), inputs(config)
    plain = dit(x, t, text)
    by_tokens = config.conditioning in ("in_context", "cross_attention")
    moved = {
        "tokens": worst(dit(x, t, text._replace(tokens=-text.tokens)), plain) > 1e-6,
        "pooled": worst(dit(x, t, text._replace(pooled=-text.pooled)), plain) > 1e-6,
    }
    assert moved == {"tokens": by_tokens, "pooled": not by_tokens}
    roles = Counter((site.port, site.role) for site in dit.sites())
    spatial = sum(block.attn1 is not None for block in dit.blocks)
    assert roles[("qkv", "text")] == (spatial if config.conditioning == "cross_attention" else 0)
    assert roles[("modulation", "text")] == (0 if by_tokens else 1)


@torch.no_grad()
def test_labels_are_rows_of_a_table() -> None:
    config = CONFIGS["class_label"]
    dit, (x, t, _) = build(config), inputs(config)
    outs = [dit(x, t, torch.full((2,), label)) for label in range(4)]
    assert all(worst(a, b) > 1e-4 for i, a in enumerate(outs) for b in outs[:i])
    with pytest.raises(IndexError):
        dit(x, t, torch.full((2,), 4))


def test_adaln_has_no_gates() -> None:
    dit = build(CONFIGS["adaln"])
    assert all(block.modulation.site.dim == 6 * 32 for block in dit.blocks)
    (x, t, text), seen = inputs(BASE), []
    fresh = build(CONFIGS["adaln"], random=False)
    fresh.final_layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fresh(x, t, text)
    assert worst(seen[0], fresh.x_embedder(x)) > 1e-2, "blocks act from the start"


def test_attention_to_the_text_starts_as_the_identity() -> None:
    fresh = build(CONFIGS["cross_attention"], random=False)
    assert all(not p.any() for block in fresh.blocks for p in block.attn2.to_out.parameters())
    assert all(block.attn2.to_k.weight.any() for block in fresh.blocks)


@torch.no_grad()
def test_in_context_equals_one_long_sequence() -> None:
    """DiT section 3.2: the tokens are appended, and treated no differently. One frame, the original's attention."""
    config = replace(CONFIGS["image"], conditioning="in_context")
    torch.manual_seed(0)
    block = DiTBlock("b", config, ("attn1", "mlp"), 8).double()
    for p in block.parameters():
        p.normal_(std=0.2)
    x, text, c = (torch.randn(2, 1, n, 32, dtype=F64) for n in (6, 5, 1))
    step = DiTInputs(c[:, 0, 0], ((0,),))
    got_x, got_text = block(x.clone(), text.clone(), step, Injection({}))
    mod = block.modulation(step.c, Injection({}))
    both = torch.cat([x, text], dim=2)[:, 0]  # b n d

    def part(name: str, layer: Any) -> Tensor:
        shift, scale, gate = (y[:, 0] for y in mod[name])
        return gate * layer(nn.functional.layer_norm(both, (32,), eps=1e-6) * (1 + scale) + shift)

    def attention(h: Tensor) -> Tensor:
        q, k, v = (
            p(h).unflatten(-1, (4, 8)).transpose(1, 2)
            for p in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        )
        out = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        return block.attn1.to_out(out.transpose(1, 2).flatten(2))

    both = both + part("attn1", attention)
    both = both + part("mlp", lambda y: block.mlp(y, no_injection))
    assert worst(torch.cat([got_x, got_text], dim=2)[:, 0], both) < 1e-10


# ---- a context of leading frames ---------------------------------------------------------------------------


class Prepend(nn.Module):
    """A frame before the video."""

    def __init__(self, frame: Tensor, one_way: bool) -> None:
        super().__init__()
        self.frame, self.one_way = frame, one_way

    def forward(self, latents: Latents, image: None) -> Latents:
        return Latents(torch.cat([self.frame, latents.x], dim=1), context=1, one_way=self.one_way)


@pytest.mark.parametrize(
    "name", ["factorised", "interleaved", "joint", "rotary", "rotary interleaved", "in_context"]
)
@torch.no_grad()
def test_every_frame_reads_a_context_which_reads_only_itself(name: str) -> None:
    config = CONFIGS[name]
    dit, (x, t, text) = build(config), inputs(config)
    frame = torch.randn(2, 1, 3, 4, 6, dtype=F64)
    entry = dit.sites()[:1]

    def run(frame: Tensor, x: Tensor, one_way: bool) -> Tensor:
        return dit(x, t, text, tapped(entry, Prepend(frame, one_way)))

    one_way, both = run(frame, x, True), run(frame, x, False)
    assert one_way.shape == (2, 4, 3, 4, 6)
    moved = run(-frame, x, True) - one_way
    assert (moved.abs().amax((0, 2, 3, 4)) > 1e-7).all(), "every frame reads it"
    assert worst(run(frame, -x, True)[:, :1], one_way[:, :1]) < 1e-12, "it does not feel the video"
    assert worst(run(frame, -x, False)[:, :1], both[:, :1]) > 1e-6
    if config.layout == "joint":
        later = dit(torch.cat([frame, x], dim=1), t, text)
        assert worst(both, later) > 1e-6, "its time is -1"


def test_a_context_in_a_plan() -> None:
    plan = ((0,), (0,), (0, 1))
    assert with_context(plan, 1, True) == ((0,), (0, 1), (0, 1), (0, 1, 2))
    assert with_context(plan, 1, False) == ((0, 1, 2, 3), (0, 1), (0, 1), (0, 1, 2))
    assert with_context(((0,),), 2, True) == ((0, 1), (0, 1), (0, 1, 2))


# ---- norms, units, initialisation --------------------------------------------------------------------------


@torch.no_grad()
def test_qk_norm_takes_the_size_out_of_queries_and_keys() -> None:
    config = CONFIGS["qk_norm"]
    args = inputs(config)
    outs = {}
    for normed in (True, False):
        dit = build(replace(config, qk_norm=normed))
        plain = dit(*args)
        for block in dit.blocks:
            for layer in (block.attn1.to_q, block.attn1.to_k):
                layer.weight.mul_(30)
                layer.bias.mul_(30)
        outs[normed] = worst(dit(*args), plain)
    assert outs[True] < 1e-3 < outs[False]


@torch.no_grad()
def test_the_convolution_sums_a_tokens_neighbours_in_its_frame() -> None:
    conv, x = TokenConv(5).double(), torch.randn(2, 3, 4 * 6, 5, dtype=F64)
    grid = x.unflatten(2, (4, 6))
    expected = grid + conv.bias
    for row in range(4):
        for column in range(6):
            for i, j in product(range(3), repeat=2):
                r, s = row + i - 1, column + j - 1
                if 0 <= r < 4 and 0 <= s < 6:
                    expected[:, :, row, column] += conv.weight[:, 0, i, j] * grid[:, :, r, s]
    assert worst(conv(x, (4, 6)), expected.flatten(2, 3)) < 1e-12


@torch.no_grad()
def test_the_convolution_starts_as_the_identity() -> None:
    """Weights without one go on as they were; inputs of another shape tell that the grid is the tokens' own."""
    plain, dit = build(BASE), build(CONFIGS["conv"], random=False)
    missing = dit.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(".conv." in name for name in missing)
    for h, w in ((4, 6), (6, 4), (2, 8)):
        x, t, text = inputs(BASE, h=h, w=w)
        assert torch.equal(dit(x, t, text), plain(x, t, text))


def test_swiglu_has_as_many_parameters_as_the_plain_unit() -> None:
    for width in (128, 384, 1152):
        count = sum(p.numel() for p in SwiGLU(width).parameters())
        plain = 8 * width * width + 5 * width
        assert abs(count / plain - 1) < 0.02


def test_depth_scaled_layers_start_smaller() -> None:
    plain, scaled = (build(replace(BASE, init=init), random=False) for init in ("dit", "depth_scaled"))  # type: ignore[arg-type]
    ours = dict(scaled.named_parameters())
    for name, p in plain.named_parameters():
        residual = name.startswith("blocks.") and name.endswith(("to_out.weight", "mlp.2.weight"))
        factor = 9**-0.5 if residual else 1.0  # three blocks of three layers that add to the stream
        assert worst(ours[name], p * factor) < 1e-7, name  # scaled in float32


@torch.no_grad()
def test_the_head_may_read_the_time_alone() -> None:
    """With every block's modulation at zero, the text can reach the output by the head only."""
    args = inputs(BASE)
    text = args[2]._replace(pooled=-args[2].pooled)
    for head_text in (True, False):
        dit = build(replace(BASE, head_text=head_text))
        for block in dit.blocks:
            for p in block.modulation.parameters():
                p.zero_()
        assert (worst(dit(args[0], args[1], text), dit(*args)) > 1e-6) == head_text


# ---- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"layout": "joint"},
            r"dit\.layout 'joint' needs dit\.plan 'all', but it is 'first\+previous'.*--dit\.plan all",
        ),
        ({"layout": "image", "plan": "all"}, r"dit\.layout 'image' needs dit\.plan 'self'"),
        ({"heads": 3}, r"dit\.hidden is 32 with dit\.heads 3; use a multiple"),
        ({"hidden": 30, "heads": 5}, r"dit\.hidden is 30.*of 4"),
        ({"heads": 32, "positions": "rotary"}, r"dit\.positions is rotary.* = 1 have no pairs"),
        ({"hidden": 36, "heads": 4, "positions": "rotary"}, r"36 / dit\.heads 4 = 9 have no pairs"),
        ({"depth": -1}, r"dit\.depth is -1; use a whole number in \[0, 1000\]"),
        ({"checkpoint_every": 0}, r"dit\.checkpoint_every is 0; use a whole number in \[1, 1000\]"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DiTConfig(**{**SHAPE, **options})


def test_modulation_has_names() -> None:
    block = build(BASE).blocks[0]
    mod = block.modulation(torch.randn(2, 32, dtype=F64), Injection({}))
    assert list(mod) == ["attn1", "attn_temp", "mlp"]
    assert all(value.shape == (2, 1, 1, 32) for part in mod.values() for value in part)
    spy = Spy()
    block.modulation(torch.randn(2, 32, dtype=F64), Injection({block.modulation.site.name: [(spy, None)]}))
    assert isinstance(spy.seen[0], Modulation)
