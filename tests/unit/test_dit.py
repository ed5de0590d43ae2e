"""Properties of the video DiT and of its sites, with every parameter random where zeros would hide something."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from spies import Spy, tapped, worst
from torch import Tensor, nn

from dit_booth.inject import QKV, Injection, Latents, Modulation, Residuals
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.layers import Attention, timestep_embedding
from dit_booth.models.positions import sincos_2d

torch.set_num_threads(1)
CHANNELS, WIDTH = 3, 128


def build(config: DiTConfig | None = None, *, random: bool = True) -> VideoDiT:
    torch.manual_seed(0)
    dit = VideoDiT(config or DiTConfig(), channels=CHANNELS, text_dim=8, text_embed_dim=6).double()
    if random:
        for parameter in dit.parameters():
            parameter.data.normal_(std=0.08)
    return dit


def without_time(dit: VideoDiT) -> VideoDiT:
    """The gate of temporal attention is the sixth of nine parts of the modulation."""
    for block in dit.blocks:
        for parameter in block.modulation.linear.parameters():
            parameter.data[5 * WIDTH : 6 * WIDTH] = 0
    return dit


def inputs(b: int = 2, f: int = 3, h: int = 4, w: int = 6) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, f, CHANNELS, h, w, generator=generator, dtype=torch.float64)
    pooled = torch.randn(b, 6, generator=generator, dtype=torch.float64)
    return x, torch.linspace(7.5, 640.0, b), Text(torch.randn(b, 5, 8, dtype=torch.float64), pooled)


# ---- the function ------------------------------------------------------------------------------------------


def test_the_output_is_zero_at_initialisation() -> None:
    dit, (x, t, text) = build(random=False), inputs()
    assert not dit(x, t, text).any()
    assert dit.x_embedder(x).any() and dit.blocks[0].attn1.to_q.weight.any(), (
        "only the head and the gates are"
    )
    assert all(not p.any() for block in dit.blocks for p in block.modulation.parameters())


def test_blocks_are_the_identity_at_initialisation() -> None:
    dit, (x, t, text) = build(random=False), inputs()
    final: list[Tensor] = []
    dit.final_layer.register_forward_pre_hook(lambda module, args: final.append(args[0]))
    dit(x, t, text)
    assert torch.equal(final[0], dit.x_embedder(x))


def test_gradients_reach_every_parameter() -> None:
    dit, (x, t, text) = build(), inputs()
    dit(x, t, text).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in dit.parameters())


def test_time_and_text_matter() -> None:
    dit, (x, t, text) = build(), inputs()
    plain = dit(x, t, text)
    assert worst(dit(x, t + 1, text), plain) > 1e-4
    assert worst(dit(x, t, text._replace(pooled=text.pooled.flip(0))), plain) > 1e-4


def test_rows_of_a_batch_are_independent() -> None:
    dit, (x, t, text) = build(), inputs()
    together = dit(x, t, text)
    for i in range(2):
        row = slice(i, i + 1)
        assert worst(together[row], dit(x[row], t[row], Text(text.tokens[row], text.pooled[row]))) < 1e-10


def test_one_frame_equals_the_first_of_many_that_read_themselves() -> None:
    dit, (x, t, text) = without_time(build(DiTConfig(plan="self"))), inputs()
    assert worst(dit(x[:, :1], t, text), dit(x, t, text)[:, :1]) < 1e-10


@pytest.mark.parametrize(
    ("plan", "changed", "felt"),
    [
        ("self", 0, {0}),
        ("self", 2, {2}),
        ("first", 0, {0, 1, 2, 3}),
        ("first", 2, {2}),
        ("first+previous", 1, {1, 2, 3}),
        ("first+previous", 3, {3}),
        ("all", 3, {0, 1, 2, 3}),
    ],
)
def test_frames_feel_what_the_plan_says(plan: str, changed: int, felt: set[int]) -> None:
    """A frame always feels itself through the residual; the rest spreads over the blocks by the plan."""
    x, t, text = inputs(f=4)
    moved = x.clone()
    moved[:, changed] *= -1

    def feels(dit: VideoDiT) -> set[int]:
        moves = (dit(moved, t, text) - dit(x, t, text)).abs().amax((0, 2, 3, 4))
        return {i for i in range(4) if moves[i] > 1e-9}

    assert feels(without_time(build(DiTConfig(plan=plan)))) == felt
    assert feels(build(DiTConfig(plan=plan))) == {0, 1, 2, 3}, "temporal attention joins all frames"


def test_other_sizes_and_frame_counts_run_and_leave_no_trace() -> None:
    dit, (x, t, text) = build(), inputs()
    before = dit(x, t, text)
    for f, h, w in ((1, 2, 2), (5, 8, 4), (4, 6, 10)):
        y, t_, text_ = inputs(f=f, h=h, w=w)
        assert dit(y, t_, text_).shape == y.shape
    assert torch.equal(dit(x, t, text), before)
    assert not dict(dit.named_buffers())


def test_places_and_frames_are_told_apart() -> None:
    """Without positions, permuting tokens or frames would permute the output."""
    dit, (x, t, text) = build(DiTConfig(plan="all", patch=1)), inputs()
    out = dit(x, t, text)
    for axis in (1, 3, 4):
        assert worst(dit(x.flip(axis), t, text).flip(axis), out) > 1e-3


@pytest.mark.parametrize("patch", [1, 2])
def test_patches_keep_their_place(patch: int) -> None:
    """With all gates zero a token sees itself only: a changed pixel changes its own patch."""
    dit, (x, t, text) = build(DiTConfig(patch=patch)), inputs(b=1, f=2, h=4, w=8)
    for block in dit.blocks:
        for parameter in block.modulation.linear.parameters():
            for gate in (2, 5, 8):
                parameter.data[gate * WIDTH : (gate + 1) * WIDTH] = 0
    moved = x.clone()
    moved[0, 1, :, 2, 5] += 1
    changed = (dit(moved, t, text) - dit(x, t, text)).abs().amax(2)[0] > 1e-9  # f h w
    expected = torch.zeros_like(changed)
    expected[1, 2 // patch * patch : 2 // patch * patch + patch, 5 // patch * patch :][:, :patch] = True
    assert torch.equal(changed, expected)


# ---- embeddings --------------------------------------------------------------------------------------------


def test_timestep_embedding_has_cosines_first() -> None:
    t, dim = torch.tensor([0.0, 1.0, 37.5, 999.0]), 8
    rows = []
    for value in t.tolist():
        angles = [value * 10_000.0 ** (-i / (dim // 2)) for i in range(dim // 2)]
        rows.append([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    assert worst(timestep_embedding(t, dim).double(), torch.tensor(rows, dtype=torch.float64)) < 1e-4
    assert timestep_embedding(t.bfloat16(), dim).dtype == torch.float32


def test_sincos_2d_fills_columns_then_rows() -> None:
    height, width, dim = 3, 5, 16
    out, quarter = sincos_2d(height, width, dim, torch.device("cpu")), dim // 4
    for row in range(height):
        for column in range(width):
            frequency = [10_000.0 ** (-i / quarter) for i in range(quarter)]
            expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in frequency]
            assert worst(out[row * width + column], torch.tensor(expected)) < 1e-6


# ---- sites -------------------------------------------------------------------------------------------------


def test_sites_are_named_by_their_modules_in_the_order_of_the_forward_pass() -> None:
    dit, inputs_ = build(), inputs()
    order: list[str] = []

    class Order(Injection):
        def __call__(self, site, payload):  # type: ignore[no-untyped-def]
            if site.port != "linear":
                order.append(site.name)
            return payload

    dit(*inputs_, Order({}))
    sites = dit.sites()
    assert order == [site.name for site in sites]
    parameters = dict(dit.named_parameters())
    for site in sites:
        if site.port != "latents":
            module = dit.get_submodule(site.name)
            assert any(name.startswith(f"{site.name}.") for name in parameters)
            if site.port == "qkv":
                assert module.site is site
                assert {k: module.get_submodule(k) for k in ("to_q", "to_k", "to_v")} == site.projections
    assert dit.text_site.projections["projection"] is dit.get_submodule(dit.text_site.name)
    assert Counter(site.role for site in sites) == {
        "entry": 1,
        "text": 1,
        "blocks": 1,
        "block": 5,
        "cross_frame": 5,
        "temporal": 5,
        "exit": 1,
    }


def test_every_site_is_called_once_with_the_documented_shapes() -> None:
    dit, (x, t, text) = build(), inputs()
    for site in dit.sites():
        spy = Spy()
        dit(x, t, text, tapped([site], spy))
        (payload,) = spy.seen
        if isinstance(payload, Latents):
            assert payload.x.shape == (2, 3, CHANNELS, 4, 6)
            assert site.dim == CHANNELS
            assert (payload.x is x) == (site.role == "entry")
        elif isinstance(payload, Residuals):
            assert payload.x.shape == (2, 3, 6, site.dim) and not payload.added
        elif isinstance(payload, Modulation):
            assert payload.vector.shape == (2, site.dim)
            assert site.dim == (WIDTH if site.role == "text" else 9 * WIDTH)
            layer = next(iter(site.projections.values()))
            assert torch.equal(payload.vector, layer(payload.source)), "the source is what was projected"
            assert (payload.source is text.pooled) == (site.role == "text")
        else:
            b, f, n = (12, 1, 3) if site.role == "temporal" else (2, 3, 6)
            (segment,) = payload.segments
            assert payload.q.shape == (b, f, n, 4, WIDTH // 4) == segment.k.shape == segment.v.shape
            assert payload.x.shape == (b, f, n, WIDTH)
            assert payload.source is payload.x
            assert segment.frames == (((0,),) if f == 1 else ((0,), (0,), (0, 1)))
            assert site.heads == 4


def test_returned_payloads_are_used() -> None:
    dit, (x, t, text) = build(), inputs()
    plain = dit(x, t, text)
    for site in dit.sites():
        assert worst(dit(x, t, text, tapped([site], Spy(1.0))), plain) == 0
        assert worst(dit(x, t, text, tapped([site], Spy(1.5))), plain) > 1e-6, site.name


def test_latents_may_grow_at_the_entry_and_shrink_at_the_exit() -> None:
    class Double(nn.Module):
        def forward(self, payload: Latents, image: None) -> Latents:
            return Latents(torch.cat([payload.x, payload.x + 1], dim=3))

    class Halve(nn.Module):
        def forward(self, payload: Latents, image: None) -> Latents:
            return Latents(payload.x.chunk(2, dim=3)[0])

    dit, (x, t, text) = build(), inputs()
    taps = Injection({"latents.entry": [(Double(), None)], "latents.exit": [(Halve(), None)]})
    expected = dit(torch.cat([x, x + 1], dim=3), t, text)[..., :4, :]
    assert worst(dit(x, t, text, taps), expected) < 1e-12


def test_checkpointing_gives_equal_gradients() -> None:
    x, t, text = inputs()
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    class Scale(nn.Module):
        def forward(self, qkv: QKV, image: None) -> QKV:
            return replace(qkv, q=qkv.q * scale)

    gradients, calls = [], []
    for checkpointing in (False, True):
        dit = build(DiTConfig(checkpointing=checkpointing))
        count = Counter()  # type: ignore[var-annotated]
        for block in dit.blocks:
            block.register_forward_pre_hook(lambda *_, count=count: count.update(["block"]))
        taps = tapped([site for site in dit.sites() if site.port == "qkv"], Scale())
        loss = dit(x, t, text, taps).square().sum()
        gradients.append(torch.autograd.grad(loss, [scale, *dit.parameters()]))
        calls.append(count["block"])
    assert calls == [5, 10], "each block is computed again"
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-12 * max(1, plain.abs().max().item())


# ---- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(5, 4), (4, 5)])
def test_latents_that_patches_do_not_divide_are_an_error(h: int, w: int) -> None:
    with pytest.raises(
        ValueError, match=rf"latents of {h} x {w} cannot be cut into patches of 2; change dit\.patch"
    ):
        build()(*inputs(h=h, w=w))


def test_other_indivisible_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1: width 10 is not divisible by 4 heads"):
        Attention("blocks.0.attn1", "cross_frame", 10, 4)
    with pytest.raises(ValueError, match="divisible by 4, not 6"):
        sincos_2d(2, 2, 6, torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": "huge"}, r"dit\.size is 'huge'; use one of nano, S, B, L, XL"),
        ({"plan": "window"}, r"plan 'window': write window\(k\)"),
    ],
)
def test_config_errors(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DiTConfig(**options)
