"""Properties of the video U-Net and of its sites, at a tiny size with every parameter random."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import pytest
import torch
from spies import Spy, tapped, worst
from torch import Tensor, nn

from dit_booth.inject import (
    QKV,
    Injection,
    Latents,
    Modulation,
    Payload,
    Recorder,
    Residuals,
    Site,
    no_injection,
)
from dit_booth.models.clip.encoders import Text
from dit_booth.models.unet.blocks import PointwiseFrameConv, UNetInputs
from dit_booth.models.unet.model import UNetConfig, VideoUNet

torch.set_num_threads(1)
TINY = UNetConfig(
    channels=(8, 16), layers_per_block=1, heads=2, norm_groups=4, text_dim=6, down_attention=(True, False)
)

WIDE = replace(TINY, channels=(12, 24), plan="all", positions="rotary")


def build(config: UNetConfig = TINY) -> VideoUNet:
    torch.manual_seed(0)
    unet = VideoUNet(config).double()
    with torch.no_grad():
        for parameter in unet.parameters():  # the zero initialisation would hide everything
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return unet


def inputs(b: int = 2, f: int = 3, h: int = 5, w: int = 7) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(b, f, 4, h, w, generator=generator, dtype=torch.float64)
    tokens = torch.randn(b, 5, TINY.text_dim, generator=generator, dtype=torch.float64)
    return x, torch.linspace(7.5, 640.0, b), Text(tokens, tokens[:, -1])


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(5, 7), (8, 8), (1, 3), (6, 9)])
def test_any_size_runs_and_gradients_reach_every_parameter(h: int, w: int) -> None:
    config = replace(TINY, channels=(8, 16, 16), down_attention=(True, True, False))
    unet = build(config)
    x, t, text = inputs(h=h, w=w)
    y = unet(x, t, text)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())


@pytest.mark.parametrize("config", [replace(TINY, linear_projection=True), replace(TINY, watermark=True)])
def test_variants_run(config: UNetConfig) -> None:
    x, t, text = inputs()
    unet = build(config)
    assert unet(x, t, text).shape == x.shape
    weight = unet.get_parameter("down_blocks.0.attentions.0.proj_in.weight")
    assert weight.ndim == (2 if config.linear_projection else 4)


def test_the_inflated_model_starts_without_temporal_attention() -> None:
    for block in (m for name, m in VideoUNet(TINY).named_modules() if name.endswith("attn_temp.to_out")):
        assert all(not p.any() for p in block.parameters())


def test_channels_may_differ() -> None:
    x, t, text = inputs()
    unet = build(replace(TINY, in_channels=9, out_channels=8))
    assert unet(x.repeat(1, 1, 3, 1, 1)[:, :, :9], t, text).shape == (2, 3, 8, 5, 7)


# ---- what reads what ---------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_independent() -> None:
    unet, (x, t, text) = build(), inputs()
    together = unet(x, t, text)
    for i in range(2):
        row = slice(i, i + 1)
        assert worst(together[row], unet(x[row], t[row], Text(text.tokens[row], text.pooled[row]))) < 1e-10


def test_one_frame_equals_copies_of_it() -> None:
    """A reference with equal noise in its copies needs one of them: outputs and hidden states are equal."""
    unet, (x, t, text) = build(), inputs(f=1)
    names = [site.name for site in unet.sites() if site.role == "cross_frame"]
    one, many = Recorder(no_injection, names), Recorder(no_injection, names)
    a, b = unet(x, t, text, one), unet(x.expand(-1, 4, -1, -1, -1), t, text, many)
    assert worst(a.expand_as(b), b) < 1e-10
    for name in names:
        assert worst(one.hidden[name].repeat(1, 4, 1), many.hidden[name]) < 1e-10


def frames_that_feel(unet: VideoUNet, changed: int) -> set[int]:
    """Frames of the transformer blocks' output that change with one frame of their input."""
    block = unet.get_submodule("down_blocks.0.attentions.0")
    text = inputs()[2]
    x = torch.randn(1, 4, 8, 5, 7, dtype=torch.float64)
    moved = x.clone()
    moved[:, changed] *= -1

    def run(x: Tensor) -> Tensor:
        return block(x, UNetInputs(x[:, 0, 0, 0], text.tokens[:1], unet.plan.frames(4), no_injection))

    moves = (run(moved) - run(x)).abs().amax((0, 2, 3, 4))
    return {i for i in range(4) if moves[i] > 1e-9}


def test_plan_self_leaves_frames_alone_without_temporal_attention() -> None:
    for plan, feels in (("self", {1}), ("first+previous", {1, 2}), ("all", {0, 1, 2, 3})):
        unet = build(replace(TINY, plan=plan))
        assert frames_that_feel(unet, 1) == {0, 1, 2, 3}, "attention over time joins all frames"
        for name, parameter in unet.named_parameters():
            if "attn_temp.to_out" in name:
                nn.init.zeros_(parameter)
        assert frames_that_feel(unet, 1) == feels


@pytest.mark.parametrize(("positions", "knows"), [("none", False), ("rotary", True)])
def test_the_frames_order_is_known_with_positions_only(
    positions: Literal["none", "rotary"], knows: bool
) -> None:
    for silent in ("attn1", "attn_temp"):  # either alone knows it
        unet, (x, t, text) = build(replace(WIDE, positions=positions)), inputs()
        for name, parameter in unet.named_parameters():
            if f"{silent}.to_out" in name:
                nn.init.zeros_(parameter)
        apart = worst(unet(x.flip(1), t, text).flip(1), unet(x, t, text))
        assert apart > 1e-3 if knows else apart < 1e-10


def test_positions_in_space_are_relative() -> None:
    """Attention over frames tells a token's neighbours apart, wherever it stands; without positions it does not."""
    for positions, knows in (("none", False), ("rotary", True)):
        unet = build(replace(WIDE, positions=positions))  # type: ignore[arg-type]
        transformer, text = unet.get_submodule("down_blocks.0.attentions.0"), inputs()[2]
        step = unet.build_inputs(
            torch.zeros(1, 32).double(), text, Latents(torch.zeros(1, 3, 4, 5, 7)), no_injection
        )
        step = step._replace(text=text.tokens[:1])
        x = torch.randn(1, 3, 12, 5, 7, dtype=torch.float64)
        mirrored = transformer(x.flip(-1), step).flip(-1)
        assert (worst(mirrored, transformer(x, step)) > 1e-3) == knows


def test_a_context_stands_before_the_video_in_time() -> None:
    """The video's frames are where they are without it; the context's places are before 0."""
    unet, (_, t, text) = build(replace(WIDE, positions="rotary")), inputs()
    x = torch.zeros(2, 5, 4, 5, 7)
    made = [unet.build_inputs(t, text, Latents(x, context=context), no_injection) for context in (0, 2)]
    assert [shared.frame_positions for shared in made] == [range(5), range(-2, 3)]


def test_a_pointwise_convolution_of_frames_is_a_1x1_convolution() -> None:
    torch.manual_seed(0)
    layer, x = PointwiseFrameConv(4, 6).double(), inputs()[0]
    expected = torch.stack([nn.functional.conv2d(video, layer.weight, layer.bias) for video in x])
    assert worst(layer(x), expected) < 1e-12


def test_residual_blocks_pool_their_norms_over_frames() -> None:
    unet, (x, t, text) = build(replace(TINY, plan="self", down_attention=(False, False))), inputs()
    nn.init.zeros_(unet.get_parameter("mid_block.attentions.0.proj_out.weight"))
    moved = x.clone()
    moved[:, 2] *= 3
    assert worst(unet(moved, t, text)[:, 0], unet(x, t, text)[:, 0]) > 1e-3


# ---- sites -------------------------------------------------------------------------------------------------


def test_sites_are_module_paths_in_forward_order() -> None:
    unet, inputs_ = build(), inputs()
    order: list[str] = []

    class Order(Injection):
        def __call__(self, site: Site, payload: Payload) -> Payload:
            if site.port != "linear":
                order.append(site.name)
            return payload

    unet(*inputs_, Order({}))
    sites = unet.sites()
    assert order == [site.name for site in sites]
    modules = dict(unet.named_modules())
    for site in sites:
        if site.port not in ("latents", "residual"):
            assert modules[site.name].site is site
        if site.port == "qkv":
            assert {k: modules[f"{site.name}.{k}"] for k in ("to_q", "to_k", "to_v")} == site.projections
    assert Counter(site.role for site in sites) == {
        "entry": 1,
        "exit": 1,
        "blocks": 1,
        "time": 1,
        "cross_frame": 4,
        "text": 4,
        "temporal": 4,
    }


def test_every_site_is_called_once_with_the_documented_shapes() -> None:
    unet, (x, t, text) = build(), inputs()
    for site in unet.sites():
        spy = Spy()
        unet(x, t, text, tapped([site], spy))
        (payload,) = spy.seen
        if isinstance(payload, Latents):
            assert payload.x.shape == (2, 3, site.dim, 5, 7)
        elif isinstance(payload, Residuals):
            assert payload.x.shape == (2, 3, 35, site.dim) and not payload.added
        elif isinstance(payload, Modulation):
            assert payload.vector.shape == (2, site.dim) == (2, 32)
            assert payload.source.shape == (2, 8)
        else:
            n = 12 if site.dim == 16 else 35
            b, f, n = (2 * n, 1, 3) if site.role == "temporal" else (2, 3, n)
            (segment,) = payload.segments
            assert payload.q.shape == (b, f, n, 2, site.dim // 2)
            assert payload.x.shape == (b, f, n, site.dim)
            if site.role == "text":
                assert torch.equal(payload.source, text.tokens.unsqueeze(1))
                assert segment.frames == ((0,),) * 3
            else:
                assert payload.source is payload.x
                assert segment.frames == (((0,),) if f == 1 else ((0,), (0,), (0, 1)))
            assert segment.k.shape == (*payload.source.shape[:3], 2, site.dim // 2) == segment.v.shape


def test_returned_payloads_are_used() -> None:
    unet, (x, t, text) = build(), inputs()
    plain = unet(x, t, text)
    for site in unet.sites():
        assert worst(unet(x, t, text, tapped([site], Spy(1.0))), plain) == 0
        assert worst(unet(x, t, text, tapped([site], Spy(1.5))), plain) > 1e-6, site.name


def test_latents_may_grow_at_the_entry_and_shrink_at_the_exit() -> None:
    class Double(nn.Module):
        def forward(self, payload: Latents, image: None) -> Latents:
            return Latents(torch.cat([payload.x, payload.x], dim=3))

    class Halve(nn.Module):
        def forward(self, payload: Latents, image: None) -> Latents:
            return Latents(payload.x.chunk(2, dim=3)[0])

    unet, (x, t, text) = build(), inputs()
    taps = Injection({"latents.entry": [(Double(), None)], "latents.exit": [(Halve(), None)]})
    assert unet(x, t, text, taps).shape == x.shape


def test_injection_leaves_the_backbone_as_it_is() -> None:
    unet, (x, t, text) = build(), inputs()
    before = {name: p.clone() for name, p in unet.state_dict().items()}
    unet(x, t, text, tapped(unet.sites(), Spy(1.5)))
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], p) for name, p in before.items())


def test_checkpointing_gives_equal_gradients() -> None:
    x, t, text = inputs()
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    class Scale(nn.Module):
        def forward(self, qkv: QKV, image: None) -> QKV:
            return replace(qkv, q=qkv.q * scale)

    gradients = []
    for checkpointing in (False, True):
        unet = build(replace(TINY, checkpointing=checkpointing))
        taps = tapped([site for site in unet.sites() if site.port == "qkv"], Scale())
        loss = unet(x, t, text, taps).square().sum()
        gradients.append(torch.autograd.grad(loss, [scale, *unet.parameters()]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-12 * max(1, plain.abs().max().item())


# ---- messages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"channels": (8, 18)}, r"18 is not a multiple of unet.norm_groups 4"),
        ({"heads": 3}, r"8 is not a multiple of unet.heads 3"),
        ({"down_attention": (True,)}, r"1 flags for the 2 levels"),
        ({"layers_per_block": 0}, r"unet.layers_per_block is 0"),
        ({"plan": "frist"}, r"frist"),
        ({"positions": "rotary"}, r"channels \(8, 16\) and unet.heads 2 make heads of width 4"),
        ({"channels": (), "down_attention": ()}, r"unet.channels is empty"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TINY, **change)  # type: ignore[arg-type]


def test_input_errors_name_the_shape() -> None:
    unet, (x, t, text) = build(), inputs()
    with pytest.raises(ValueError, match=r"x is .*c = 4"):
        unet(x.transpose(1, 2), t, text)
    with pytest.raises(ValueError, match="one timestep per video"):
        unet(x, t[:1], text)
    with pytest.raises(ValueError, match=r"d = 6 \(unet.text_dim\)"):
        unet(x, t, Text(text.tokens[..., :5], text.pooled))
