"""The seam: how taps are named, composed, recorded and chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.inject import (
    QKV,
    Condition,
    Injection,
    Latents,
    Modulation,
    Recorder,
    Reference,
    Site,
    Sites,
    no_injection,
    suggest,
)
from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.layers import Attention
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.strategy import Strategies, Strategy, StrategyConfig

torch.set_num_threads(1)


def dit() -> VideoDiT:
    torch.manual_seed(0)
    backbone = VideoDiT(DiTConfig(), channels=3, text_dim=8, text_embed_dim=6)
    for p in backbone.parameters():
        p.data.normal_(std=0.1)
    return backbone


def sites_of(*sites: Site) -> Sites:
    return Sites(sites, image_dim=8, image_embed_dim=8, latent_channels=3, frames=3)


class Affine(nn.Module):
    """y = factor * x + shift on a latent, plus the condition's latent where there is one."""

    def __init__(self, factor: float, shift: float) -> None:
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.tensor(factor)), nn.Parameter(torch.tensor(shift))

    def forward(self, payload: Latents, condition: Condition) -> Latents:
        x = self.factor * payload.x + self.shift
        return Latents(x if condition.latent is None else x + condition.latent)


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
    backwards = {name: Condition() for name in reversed(order)}
    assert strategies.bind(backwards)(ENTRY, x).x.unique().item() == expected, (
        "the order of conditions is none"
    )


def test_only_strategies_with_a_condition_are_bound_and_each_gets_its_own() -> None:
    strategies = Strategies({"plus": affine(1.0, 1.0), "times": affine(2.0, 0.0)})
    x = Latents(torch.full((1, 1, 3, 1, 1), 3.0))
    assert strategies.bind({})(ENTRY, x) is x
    assert strategies.bind({"times": Condition()})(ENTRY, x).x.unique().item() == 6
    mine = Condition(latent=torch.full((1, 1, 3, 1, 1), 10.0))
    assert strategies.bind({"plus": mine, "times": Condition()})(ENTRY, x).x.unique().item() == 28
    assert strategies.bind({"plus": mine})(EXIT, x) is x, "another site"


def test_strategies_make_conditions_for_the_active_ones_only() -> None:
    class Says(Strategy):
        def forward(self, reference: Reference) -> Condition:
            return Condition(vector=reference.embedding)

    empty = sites_of()
    strategies = Strategies({n: Says(StrategyConfig(), empty) for n in ("a", "b", "c")})
    e = torch.ones(1, 2)
    made = strategies(Reference(e, (), e, e, e), ("c", "a"))
    assert list(made) == ["a", "c"]
    assert all(c.vector is e for c in made.values())
    silent = Strategy(StrategyConfig(), empty)
    assert silent(Reference(e, (), e, e, e)) == Condition()


def test_no_injection_returns_its_argument() -> None:
    payload = Latents(torch.zeros(1, 1, 1, 1, 1))
    assert no_injection(ENTRY, payload) is payload


# ---- recording ---------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, qkv: QKV, condition: Condition) -> QKV:
        return replace(qkv, q=qkv.q * 3.0)


def test_recorder_keeps_hidden_states_while_taps_stay_active() -> None:
    backbone, wanted = dit(), ["blocks.1.attn1", "blocks.3.attn1"]
    x, t = torch.randn(2, 2, 3, 4, 6), torch.tensor([3.0, 700.0])
    text = Text(torch.randn(2, 5, 8), torch.randn(2, 6))
    seen: dict[str, Tensor] = {}

    class Spy(Injection):
        def __call__(self, site, payload):  # type: ignore[no-untyped-def]
            if isinstance(payload, QKV):
                seen[site.name] = payload.x
            return super().__call__(site, payload)

    taps = {"blocks.1.attn1": [(Scale(), Condition())]}
    with torch.no_grad():
        tapped = backbone(x, t, text, Spy(taps))
        recorder = Recorder(Injection(taps), wanted)
        recorded = backbone(x, t, text, recorder)
        plain = Recorder(no_injection, wanted)
        untouched = backbone(x, t, text, plain)
    assert torch.equal(recorded, tapped)
    assert not torch.equal(recorded, untouched)
    assert set(recorder.hidden) == set(wanted)
    for name in wanted:
        assert torch.equal(recorder.hidden[name], seen[name].flatten(1, 2))
        assert recorder.hidden[name].shape == (2, 2 * 6, 128)
    assert torch.equal(recorder.hidden["blocks.1.attn1"], plain.hidden["blocks.1.attn1"]), "before the tap"
    assert not torch.equal(recorder.hidden["blocks.3.attn1"], plain.hidden["blocks.3.attn1"]), "after it"


def test_only_attentions_have_a_hidden_state_to_record() -> None:
    site = Site(name="blocks.0.modulation", port="modulation", role="block", dim=4)
    with pytest.raises(AssertionError, match=r"blocks.0.modulation has no hidden state"):
        Recorder(no_injection, [site.name])(site, Modulation(torch.zeros(1, 4), torch.zeros(1, 4)))


def test_a_reference_asks_for_the_latent_that_the_noise_option_names() -> None:
    asked: list[tuple[Tensor, bool, tuple[str, ...]]] = []

    def record(latent: Tensor, clean: bool, sites: list[str]) -> dict[str, Tensor]:
        asked.append((latent, clean, tuple(sites)))
        return {"a": latent}

    clean, noisy, nothing = torch.zeros(1), torch.ones(1), torch.zeros(0)
    reference = Reference(nothing, (), nothing, clean, noisy, record)
    assert reference.hidden(["a"], "matched")["a"] is noisy
    assert reference.hidden(["a"], "clean")["a"] is clean
    assert [(a[1], a[2]) for a in asked] == [(False, ("a",)), (True, ("a",))]
    with pytest.raises(AssertionError, match=r"inside Injected\.forward"):
        replace(reference, record=None).hidden(["a"], "clean")


# ---- sites -------------------------------------------------------------------------------------------------


def test_sites_match_by_glob_port_and_role() -> None:
    sites = sites_of(*dit().sites())
    assert [s.name for s in sites.match("blocks.[13].attn1", port="qkv")] == [
        "blocks.1.attn1",
        "blocks.3.attn1",
    ]
    assert len(sites.match("*", role="temporal")) == 5
    assert len(sites.match("*")) == len(sites) == 18
    assert {s.role for s in sites.match("blocks.*", port="qkv")} == {"cross_frame", "temporal"}
    assert sites.of(port="qkv", role="text") == [], "a DiT has no text attention"
    assert [s.name for s in sites.of(port="latents")] == ["latents.entry", "latents.exit"]
    assert sites[0].name == "latents.entry"


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
        def forward(self, qkv: QKV, condition: Condition) -> QKV:
            seen.append(qkv)
            return qkv

    x = torch.randn(1, 2, 3, 8)
    attention(x, x, ((0,), (1,)), Injection({"a": [(Keep(), Condition())]}))
    (qkv,) = seen
    assert torch.equal(qkv.heads(attention.to_k(x)), qkv.segments[0].k)
    assert torch.equal(qkv.heads(attention.to_v(x)), qkv.segments[0].v)
    more = Segment(qkv.segments[0].k, qkv.segments[0].v, ((0,), ()))
    assert qkv.reading(more).segments == (qkv.segments[0], more)
