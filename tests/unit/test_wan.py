"""Wan is diffusers' `WanTransformer3DModel`: outputs, gradients, precision, times per frame; and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import official
import pytest
import torch
from dit_booth.strategies.decoupled_attention import DecoupledAttention, DecoupledAttentionConfig
from einops import rearrange, repeat
from spies import Spy, worst
from torch import Tensor, nn

from dit_booth.attention import Clip, Riflex, WindowFusion
from dit_booth.inject import Condition, Injection, Sites
from dit_booth.models.clip.encoders import Text
from dit_booth.models.positions import rotary_3d
from dit_booth.models.wan.blocks import AcrossHeadsNorm
from dit_booth.models.wan.model import VideoWan, WanConfig
from dit_booth.strategy import Strategies

torch.set_num_threads(1)
TEXT = 512  # diffusers cuts image from text tokens there
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 32, "in_channels": 9}
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "no norm before the text": {"cross_attn_norm": False},
    "image": IMAGE,
    "heads of 24": {"attention_head_dim": 24, "num_attention_heads": 1},
}


def config(**upstream: Any) -> WanConfig:
    """The options of a network of ours for diffusers' settings."""
    settings = {**official.TINY_WAN, **upstream}
    return WanConfig(
        depth=settings["num_layers"],
        hidden=settings["num_attention_heads"] * settings["attention_head_dim"],
        heads=settings["num_attention_heads"],
        ffn=settings["ffn_dim"],
        cross_attn_norm=settings.get("cross_attn_norm", True),
        image_dim=settings.get("image_dim", 0),
        condition_channels=settings["in_channels"] - settings["out_channels"],
    )


def pair(dtype: torch.dtype = torch.float32, **upstream: Any) -> tuple[nn.Module, VideoWan]:
    """Return diffusers' network, all its parameters random, and ours with the same ones."""
    theirs = official.randomised(official.wan(**upstream)).to(dtype)
    ours = VideoWan(config(**upstream), channels=4, text_dim=24).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


class Inputs:
    """Two videos of three frames, higher than wide, with 512 text tokens and (for `image`) image states."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, channels: int = 4, image: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.tokens = draw(2, 3, channels, 6, 4), draw(2, TEXT, 24)
        self.image = draw(2, 7, 20) if image else None
        self.t = torch.tensor([996.5, 13.0])
        self.times = torch.tensor([[0.0, 500.25, 999.0], [250.0, 250.0, 3.0]])

    def theirs(self, model: nn.Module, t: Tensor) -> Tensor:
        """diffusers' prediction at timesteps (b,), or (b f), which it takes for every token."""
        if t.ndim == 2:
            t = repeat(t, "b f -> b (f n)", n=self.x[0, 0, 0].numel() // 4)
        x = rearrange(self.x, "b f c h w -> b c f h w")
        out: Tensor = model(x, t, self.tokens, encoder_hidden_states_image=self.image).sample
        return rearrange(out, "b c f h w -> b f c h w")

    def ours(self, model: VideoWan, t: Tensor) -> Tensor:
        out: Tensor = model(self.x, t, Text(self.tokens, self.tokens[:, 0]), image=self.image)
        return out


def inputs_for(kind: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(dtype, channels=KINDS[kind].get("in_channels", 4), image=kind == "image")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_network(kind: str) -> None:
    (theirs, ours), given = pair(**KINDS[kind]), inputs_for(kind)
    for t in (given.t, given.times):
        expected = given.theirs(theirs, t)
        assert expected.abs().max() > 0.3
        assert worst(given.ours(ours, t), expected) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_network_in_float64_with_its_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers computes parts in float32 whatever the dtype: here it is made to compute them in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (theirs, ours), given = pair(torch.float64, **KINDS[kind]), inputs_for(kind, torch.float64)
    for t in (given.t, given.times):
        outputs = given.theirs(theirs, t), given.ours(ours, t)
        assert worst(*outputs) <= 1e-9
        for model, out in zip((theirs, ours), outputs, strict=True):
            model.zero_grad()
            (out * given.x[:, :, :4]).sum().backward()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in ours.named_parameters():
            assert p.grad is not None and worst(p.grad, expected[name]) <= 1e-9, name


@pytest.mark.slow
@torch.no_grad()
def test_blocks_that_read_an_image_compile_without_a_graph_break() -> None:
    (_, net), given = pair(**IMAGE), inputs_for("image")
    expected = given.ours(net, given.t)
    net.compile_blocks(backend="eager")  # fullgraph
    torch.testing.assert_close(given.ours(net, given.t), expected)


# ---- precision ---------------------------------------------------------------------------------------------


def float32_parts(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.dtype == torch.float32}


@torch.no_grad()
def test_in_bfloat16_the_same_parts_stay_in_float32() -> None:
    """Ours is as near diffusers' in bfloat16 as rounding lets two orders of sums be, and as near to float32."""
    (theirs, ours), given = pair(), Inputs()
    exact = given.theirs(theirs, given.t)
    for name, p in theirs.named_parameters():  # as from_pretrained does, which needs accelerate
        if not set(theirs._keep_in_fp32_modules) & set(name.split(".")):
            p.data = p.bfloat16()
    ours.to_precision(torch.bfloat16)
    assert float32_parts(ours) == float32_parts(theirs) >= {"scale_shift_table"}
    given.x, given.tokens = given.x.bfloat16(), given.tokens.bfloat16()
    expected, out = given.theirs(theirs, given.t), given.ours(ours, given.t)
    assert out.dtype == torch.bfloat16
    error, difference = (expected - exact).abs().mean().item(), (out - expected).abs().mean().item()
    assert difference <= 0.5 * error
    assert (out - exact).abs().mean() <= 1.1 * error
    rounded = ours.bfloat16()
    assert (given.ours(rounded, given.t) - exact).abs().mean() > (out - exact).abs().mean()


# ---- positions and plans -----------------------------------------------------------------------------------


def own(**more: Any) -> VideoWan:
    """Return a network with random parameters and heads of 16."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"depth": 2, "hidden": 32, "heads": 2, "ffn": 40, **more}
    net = VideoWan(WanConfig(**settings), channels=4, text_dim=24)
    official.randomised(net)
    return net.double()


def clip_of(*frames: int, **more: Any) -> Injection:
    return Injection({}, clip=Clip(frames, **more))


@torch.no_grad()
def test_positions_are_relative_so_a_video_may_begin_anywhere() -> None:
    net, given = own(), Inputs(torch.float64)
    words = Text(given.tokens, given.tokens[:, 0])
    first = net(given.x, given.t, words)
    assert worst(net(given.x, given.t, words, clip_of(40, 41, 42)), first) <= 1e-10
    assert worst(net(given.x, given.t, words, clip_of(0, 1, 4)), first) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("place", ["before", "first", "after"])
def test_a_references_keys_have_the_place_that_is_asked_for(place: Any) -> None:
    """Before frame 0 of the video, at frame 0, or after the last frame of the pass."""
    net = own(reference_place=place)
    x, text = torch.randn(1, 3, 4, 6, 4, dtype=torch.float64), torch.randn(1, 5, 24, dtype=torch.float64)
    spy, taken = Spy(), {"before": -1, "first": 0, "after": 10}[place]
    inject = Injection({"blocks.0.attn1": [(spy, None)]}, clip=Clip((7, 8, 9)))
    net(x, torch.tensor([500.0]), Text(text, text[:, 0]), inject)
    (qkv,), raw = spy.seen, torch.randn(1, 1, 6, 2, 16, dtype=torch.float64)
    normed = net.get_submodule("blocks.0.attn1.norm_k")(raw)

    def placed(frame: int) -> Tensor:
        return rotary_3d((frame,), 3, 2, 16, raw.device, raw.dtype, interleaved=True).apply(normed)

    assert worst(qkv.layer.image_keys(raw), placed(taken)) <= 1e-12
    assert worst(qkv.layer.image_keys(raw), placed(4)) > 1e-2
    assert torch.equal(qkv.layer.keys(raw), placed(7))


@torch.no_grad()
def test_norms_span_all_heads() -> None:
    norm, x = AcrossHeadsNorm(32), torch.randn(1, 1, 3, 2, 16)
    official.randomised(norm)
    expected = nn.functional.rms_norm(x.flatten(-2), (32,), norm.weight, eps=1e-6)
    assert worst(norm(x).flatten(-2), expected) <= 1e-6
    assert worst(norm(x)[..., 0, :], norm(torch.cat([x[..., :1, :], 9 * x[..., 1:, :]], -2))[..., 0, :]) > 0.1


@torch.no_grad()
def test_longer_videos_change_the_rotary_time() -> None:
    net, given = own(), Inputs(torch.float64)
    words = Text(given.tokens, given.tokens[:, 0])
    plain, same, longer = (
        net(given.x, given.t, words, clip_of(0, 1, 2, riflex=Riflex(9, length))) for length in (9, 9, 40)
    )
    assert torch.equal(plain, same) and worst(plain, longer) > 1e-5
    with pytest.raises(ValueError, match=r"freenoise, which averages windows of temporal attention; Wan has"):
        net(given.x, given.t, words, clip_of(0, 1, 2, fusion=WindowFusion(2, 1)))


# ---- what is refused ---------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit() -> None:
    net, given = own(condition_channels=5), Inputs(torch.float64)
    words = Text(given.tokens, given.tokens[:, 0])
    with pytest.raises(
        ValueError, match=r"latents of 5 x 4 cannot be cut into patches of 2; change wan\.patch"
    ):
        net(given.x[..., :5, :], given.t, words)
    with pytest.raises(ValueError, match=r"x is \(2, 3, 3, 6, 4\); give .* c = 4, or 9 with the condition"):
        net(given.x[:, :, :3], given.t, words)
    with pytest.raises(ValueError, match=r"image states were given, but wan\.image_dim is 0"):
        net(given.x, given.t, words, image=torch.zeros(2, 7, 20, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"text\.tokens is \(2, 512, 9\); give \(b l c\) with c = 24"):
        net(given.x, given.t, Text(given.tokens[..., :9], given.tokens[:, 0]))
    zeros = torch.zeros(2, 3, 5, 6, 4, dtype=torch.float64)
    assert torch.equal(net(given.x, given.t, words), net(torch.cat([given.x, zeros], dim=2), given.t, words))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": "2b"}, "wan.size is '2b'; use one of nano, 1.3b, 14b"),
        ({"heads": 3}, "wan.hidden is 128 with wan.heads 3; heads need an even width of 6 or more"),
        ({"hidden": 16}, "heads need an even width of 6 or more"),
        ({"plan": "future"}, "unknown term 'future'"),
        ({"depth": -1}, "wan.depth is -1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        WanConfig(**options)


# ---- the start of a strategy -------------------------------------------------------------------------------


@torch.no_grad()
def test_decoupled_attention_starts_from_the_weights_of_image_keys() -> None:
    """Where the weights have them, the image is read by those keys, normalised as they are: the base's own softmax."""
    theirs, net = pair(**IMAGE)
    sites = Sites(tuple(net.sites()), 20, 12, 4, 3)
    strategy = DecoupledAttention(DecoupledAttentionConfig(tokens=7), sites)
    own = net.get_submodule("blocks.1.attn2").state_dict()
    for name in "kv":
        start = strategy.state_dict()[f"taps.blocks.1.attn2.to_{name}_ip.weight"]
        assert torch.equal(start, own[f"add_{name}_proj.weight"])
    given = inputs_for("image")
    assert given.image is not None
    expected = given.theirs(theirs, given.t)
    embedded = net.get_submodule("condition_embedder.image_embedder")(given.image)
    made = {at: reader.project(embedded) for at, reader in strategy.readers.items()}
    strategies = Strategies({"decoupled_attention": strategy})
    inject = strategies.bind(("decoupled_attention",), {"decoupled_attention": Condition(at=made)})
    out = net(given.x, given.t, Text(given.tokens, given.tokens[:, 0]), inject)
    assert worst(out, expected) <= 2e-5
