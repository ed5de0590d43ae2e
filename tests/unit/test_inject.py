"""The seam: how taps are named, combined and chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spies import dit, sites_of
from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.errors import suggest
from dit_booth.inject import (
    KV,
    QKV,
    Condition,
    Injection,
    Latents,
    PlainLayer,
    Site,
    no_injection,
)
from dit_booth.models.layers import Attention
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.strategy import Strategies, Strategy, StrategyConfig

torch.set_num_threads(1)


class Affine(nn.Module):
    """y = factor * x + shift on a latent, plus the image where there is one."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.tensor(factor)), nn.Parameter(torch.tensor(shift))

    def forward(self, payload: Latents, image: Tensor | None) -> Latents:
        x = self.factor * payload.x + self.shift
        return Latents(x if image is None else x + image)


ENTRY = Site(name="latents.entry", port="latents", role="entry", dim=3)
EXIT = Site(name="latents.exit", port="latents", role="exit", dim=3)


def affine(factor: float, shift: float) -> Strategy:
    strategy = Strategy(StrategyConfig(), sites_of(ENTRY))
    strategy.attach(ENTRY, Affine(factor, shift))
    return strategy


# ---- taps and their names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_attach_names_parameters_by_their_site(kind: str) -> None:
    backbone = (
        dit()
        if kind == "dit"
        else VideoUNet(UNetConfig(channels=(8, 16), norm_groups=4, heads=2, down_attention=(True, True)))
    )
    strategy = Strategy(StrategyConfig(), sites_of(*backbone.sites()))
    for site in backbone.sites():
        strategy.attach(site, nn.Linear(site.dim, 1))
    names = dict(strategy.named_parameters())
    found = {name.removeprefix("taps.").rpartition(".")[0] for name in names}
    assert found == {site.name for site in backbone.sites()}
    assert all(name.startswith("taps.") for name in names)
    for site in backbone.sites():
        tap = strategy.get_submodule(f"taps.{site.name}")
        assert tap is strategy.attached[site.name]
        assert names[f"taps.{site.name}.weight"].shape[1] == site.dim
    composed = Strategies({"mine": strategy})
    assert {f"mine.{name}" for name in names} == set(dict(composed.named_parameters()))
    assert composed.part("mine") is strategy


@pytest.mark.parametrize(("order", "expected"), [(("plus", "times"), 8.0), (("times", "plus"), 7.0)])
def test_taps_of_a_site_act_in_the_written_order(order: tuple[str, ...], expected: float) -> None:
    parts = {"plus": affine(1.0, 1.0), "times": affine(2.0, 0.0)}
    strategies = Strategies({name: parts[name] for name in order})
    x = Latents(torch.full((1, 1, 3, 1, 1), 3.0))
    for active in (order, order[::-1]):
        assert strategies.bind(active)(ENTRY, x).x.unique().item() == expected, (
            "as the combination is written"
        )


def test_only_active_strategies_are_bound_and_each_tap_gets_its_own_condition() -> None:
    strategies = Strategies({"plus": affine(1.0, 1.0), "times": affine(2.0, 0.0)})
    x = Latents(torch.full((1, 1, 3, 1, 1), 3.0))
    ten = torch.full((1, 1, 3, 1, 1), 10.0)
    mine = {"plus": Condition(shared=ten)}
    assert strategies.bind([])(ENTRY, x) is x
    assert strategies.bind(["times"])(ENTRY, x).x.unique().item() == 6
    assert strategies.bind(["times"], mine)(ENTRY, x).x.unique().item() == 6, "plus is not active"
    assert strategies.bind(["plus", "times"], mine)(ENTRY, x).x.unique().item() == 28
    assert strategies.bind(["plus"], mine)(EXIT, x) is x, "another site"
    here = {"plus": Condition(shared=ten, at={"latents.entry": 2 * ten})}
    assert strategies.bind(["plus"], here)(ENTRY, x).x.unique().item() == 24, (
        "a site's entry before the shared one"
    )
    elsewhere = {"plus": Condition(shared=ten, at={"latents.exit": 2 * ten})}
    assert strategies.bind(["plus"], elsewhere)(ENTRY, x).x.unique().item() == 14


def test_a_tap_without_an_image_gets_none() -> None:
    got: list[object] = []

    class Keep(nn.Module):
        def forward(self, payload: Latents, image: object) -> Latents:
            got.append(image)
            return payload

    strategy, x = Strategy(StrategyConfig(), sites_of(ENTRY)), Latents(torch.zeros(1, 1, 3, 1, 1))
    strategy.attach(ENTRY, Keep())
    strategies = Strategies({"mine": strategy})
    for conditions in (None, {}, {"mine": Condition()}, {"mine": Condition(at={"latents.exit": 1})}):
        strategies.bind(["mine"], conditions)(ENTRY, x)
    assert got == [None] * 4


def test_no_injection_returns_its_argument() -> None:
    payload = Latents(torch.zeros(1, 1, 1, 1, 1))
    assert no_injection(ENTRY, payload) is payload


# ---- sites -------------------------------------------------------------------------------------------------


def test_sites_match_by_glob_port_and_role() -> None:
    sites = sites_of(*dit().sites())
    assert [s.name for s in sites.match("blocks.[13].attn1", port="qkv")] == [
        "blocks.1.attn1",
        "blocks.3.attn1",
    ]
    assert len(sites.match("*", role="temporal")) == 5
    assert sites.match("*") == list(sites) == list(sites.items) and len(sites.items) == 19
    assert {s.role for s in sites.match("blocks.*", port="qkv")} == {"cross_frame", "temporal"}
    assert sites.of(port="qkv", role="text") == [], "a DiT has no text attention"
    assert [s.name for s in sites.of(port="latents")] == ["latents.entry", "latents.exit"]
    assert sites.items[0].name == "latents.entry"


def test_a_glob_without_a_site_is_an_error_with_the_nearest_names() -> None:
    sites = sites_of(*dit().sites())
    with pytest.raises(ValueError, match=r"'blocks\.1\.atn1' matches none of the 5 sites") as error:
        sites.match("blocks.1.atn1", port="qkv", role="cross_frame")
    assert "port qkv and role cross_frame" in str(error.value)
    assert "nearest: blocks.1.attn1" in str(error.value)
    with pytest.raises(ValueError, match=r"none of the 0 sites of port prompt and role any$"):
        sites.match("*", port="prompt")


def test_suggest() -> None:
    assert suggest("adain", ["adaln", "none", "kv_concat"]) == "; nearest: adaln"
    assert suggest("zzz", ["b", "a"]) == "; nearest: a, b"
    assert suggest("zzz", []) == ""


def test_copy_of_is_an_independent_trainable_copy() -> None:
    attention = Attention("a", "cross_frame", 8, 2, bias=True).requires_grad_(False)
    copy, to_k = attention.site.copy_of("to_k"), attention.to_k
    assert copy.weight.requires_grad and copy.bias.requires_grad
    assert not to_k.weight.requires_grad
    assert torch.equal(copy.weight, to_k.weight) and torch.equal(copy.bias, to_k.bias)
    before = to_k.weight.clone()
    with torch.no_grad():
        copy.weight.add_(1.0)
    assert torch.equal(to_k.weight, before)
    assert torch.equal(attention.site.copy_of("to_k").weight, before), "a later copy is of the site's own"
    with pytest.raises(KeyError):
        attention.site.copy_of("to_qq")


def test_heads_splits_a_projection_as_the_attention_does() -> None:
    attention = Attention("a", "cross_frame", 8, 2)
    seen: list[QKV] = []

    class Keep(nn.Module):
        def forward(self, qkv: QKV, image: None) -> QKV:
            seen.append(qkv)
            return qkv

    x = torch.randn(1, 2, 3, 8)
    attention(x, x, ((0,), (1,)), Injection({"a": [(Keep(), None)]}))
    (qkv,) = seen
    assert torch.equal(qkv.heads(attention.to_k(x)), qkv.segments[0].k)
    assert torch.equal(qkv.heads(attention.to_v(x)), qkv.segments[0].v)
    more = Segment(qkv.segments[0].k, qkv.segments[0].v, ((0,), ()))
    assert qkv.reading(more).segments == (qkv.segments[0], more)
    kv = KV(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    (_, image), (_, first) = (qkv.reading_image(kv, seen).segments for seen in (None, ((0,), ())))
    assert torch.equal(image.k, qkv.keys(kv.k[:, None])) and torch.equal(image.v, qkv.heads(kv.v[:, None]))
    assert image.frames == ((0,), (0,)) and first.frames == ((0,), ())


def test_a_layer_norms_and_rotates_queries_and_keys_but_no_values() -> None:
    class Doubles(PlainLayer):
        def queries(self, q: Tensor) -> Tensor:
            return 2 * q

        def keys(self, k: Tensor) -> Tensor:
            return 3 * k

    x = torch.randn(1, 2, 3, 8)
    plain = QKV(torch.zeros(1, 2, 3, 2, 4), (), x, x)
    own = replace(plain, layer=Doubles())
    assert torch.equal(plain.queries(x), plain.heads(x)) and torch.equal(plain.keys(x), plain.heads(x))
    assert torch.equal(own.queries(x), 2 * own.heads(x)) and torch.equal(own.keys(x), 3 * own.heads(x))
    kv = KV(torch.randn(1, 4, 8), torch.randn(1, 4, 8))
    image = own.image(kv)
    assert torch.equal(image.k, 3 * own.heads(kv.k[:, None])) and torch.equal(
        image.v, own.heads(kv.v[:, None])
    )
