"""The seam: how taps are named, composed, recorded and chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit_booth.attention import Segment
from dit_booth.errors import suggest
from dit_booth.inject import (
    KV,
    QKV,
    Condition,
    Hidden,
    Injection,
    Latents,
    Modulation,
    Needs,
    Noise,
    PlainLayer,
    Recorder,
    Reference,
    Site,
    Sites,
    no_injection,
)
from dit_booth.models.clip.encoders import Prompt, Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.injected import Injected
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


class Wants(Strategy):
    """A strategy of given needs, whose condition holds its arguments."""

    def __init__(self, needs: Needs) -> None:
        super().__init__(StrategyConfig(), sites_of())
        self.wanted = needs

    def needs(self) -> Needs:
        return self.wanted

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=(reference, dict(hidden)))


def reference(batch: int = 1) -> Reference:
    e = torch.ones(batch, 2)
    return Reference(e, (), e, torch.zeros(batch, 1, 3, 4, 6), torch.ones(batch, 1, 3, 4, 6))


def test_conditions_are_made_of_the_active_strategies_needs_alone() -> None:
    parts = {
        "a": Wants(Needs(("x",), "clean")),
        "b": Wants(Needs(("x", "y"), "matched")),
        "c": Wants(Needs()),
    }
    strategies, image = Strategies(parts), reference()
    states = {
        name: torch.full((1,), float(i)) for i, name in enumerate(("clean x", "matched x", "matched y"))
    }
    hidden: dict[Noise, Hidden] = {
        "clean": {"x": states["clean x"]},
        "matched": {"x": states["matched x"], "y": states["matched y"], "z": torch.zeros(1)},
    }
    made = strategies(image, hidden, ("c", "b", "a"))
    assert list(made) == ["a", "b", "c"]
    assert made["a"].shared == (image, {"x": states["clean x"]})
    assert made["b"].shared == (image, {"x": states["matched x"], "y": states["matched y"]})
    assert made["c"].shared == (image, {}), "it needs no pass"
    assert list(strategies(image, {}, ["c"])) == ["c"]
    assert Strategy(StrategyConfig(), sites_of())(image, {}) == Condition()
    assert strategies.reference_frames(["a", "b", "c"]) == strategies.reference_frames([]) == 1
    parts["b"].wanted = Needs(("x",), "matched", frames=3)
    assert strategies.reference_frames(["a", "b"]) == 3 and strategies.reference_frames(["a", "c"]) == 1


def test_a_site_that_needs_does_not_name_is_not_there() -> None:
    class Greedy(Wants):
        def forward(self, reference: Reference, hidden: Hidden) -> Condition:
            return Condition(shared=hidden["y"])

    states: dict[Noise, Hidden] = {"clean": {"x": torch.zeros(1), "y": torch.zeros(1)}}
    with pytest.raises(KeyError, match="y"):
        Strategies({"greedy": Greedy(Needs(("x",)))})(reference(), states, ["greedy"])


@pytest.mark.parametrize(
    ("needs", "constant"),
    [
        (Needs(), True),
        (Needs(("a",)), True),
        (Needs(("a",), "clean"), True),
        (Needs(("a",), "matched"), False),
        (Needs((), "matched"), True),  # no pass at all
    ],
)
def test_a_condition_is_constant_unless_it_needs_the_noised_reference(needs: Needs, constant: bool) -> None:
    assert needs.constant is constant


def test_no_injection_returns_its_argument() -> None:
    payload = Latents(torch.zeros(1, 1, 1, 1, 1))
    assert no_injection(ENTRY, payload) is payload


# ---- recording ---------------------------------------------------------------------------------------------


class Scale(nn.Module):
    def forward(self, qkv: QKV, image: None) -> QKV:
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

    taps = {"blocks.1.attn1": [(Scale(), None)]}
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


def model_of(*parts: Strategy) -> Injected:
    """A DiT under strategies that read no prompt, so that the text encoder may be a stub."""
    null = Prompt.without_subject(torch.zeros(1, 5, dtype=torch.long))
    strategies = Strategies({f"s{i}": part for i, part in enumerate(parts)})
    return Injected(dit(), NoText(), strategies, null)  # type: ignore[arg-type]


class NoText(nn.Module):
    def forward(self, prompt: Prompt, inject: Injection) -> Text:
        rows = len(prompt.ids)
        return Text(torch.zeros(rows, 5, 8), torch.zeros(rows, 6))


A, B = "blocks.1.attn1", "blocks.3.attn1"
STEP = torch.randn(2, 2, 3, 4, 6, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 700.0])
PROMPT = Prompt.without_subject(torch.ones(2, 5, dtype=torch.long))


def passes(model: Injected) -> list[tuple[int, list[float]]]:
    """Return a list that gets (frames, timesteps) of every pass through the backbone from now on."""
    calls: list[tuple[int, list[float]]] = []
    model.backbone.register_forward_pre_hook(
        lambda _, args: calls.append((args[0].shape[1], args[1].tolist()))
    )
    return calls


VIDEO, MATCHED, CLEAN = (2, [3.0, 700.0]), (1, [3.0, 700.0]), (1, [0.0, 0.0])


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ([Needs()], []),
        ([Needs((A,), "clean")], [CLEAN]),
        ([Needs((A,), "matched")], [MATCHED]),
        ([Needs((A,), "matched"), Needs((A, B), "matched")], [MATCHED]),
        ([Needs((A,), "clean"), Needs((B,), "clean"), Needs()], [CLEAN]),
        ([Needs((A,), "clean"), Needs((B,), "matched"), Needs((A,), "matched")], [MATCHED, CLEAN]),
    ],
)
@torch.no_grad()
def test_the_reference_passes_once_for_each_kind_of_noise_that_is_needed(
    needs: list[Needs], expected: list[object]
) -> None:
    model = model_of(*(Wants(n) for n in needs))
    calls = passes(model)
    model(*STEP, PROMPT, reference(2))
    assert calls == [*expected, VIDEO]
    hidden = model.record(STEP[1], reference(2), model.strategy.names)
    assert {noise: set(states) for noise, states in hidden.items()} == {
        noise: {site for n in needs if n.noise == noise for site in n.sites}
        for noise in {n.noise for n in needs if n.sites}
    }
    assert all(h.shape == (2, 6, 128) for states in hidden.values() for h in states.values())
    del calls[:]
    model(*STEP, PROMPT, None)
    assert calls == [VIDEO], "without a reference nothing is recorded"
    model.active = ()
    model(*STEP, PROMPT, reference(2))
    assert calls == [VIDEO] * 2, "an inactive strategy needs nothing"


@torch.no_grad()
def test_strategies_that_need_the_same_pass_share_what_it_records() -> None:
    both, alone = model_of(Wants(Needs((A,))), Wants(Needs((A, B)))), model_of(Wants(Needs((A, B))))
    made = both.conditions(STEP[1], reference(2), both.active)
    (first, second), (only,) = (
        [condition.shared[1] for condition in conditions.values()]
        for conditions in (made, alone.conditions(STEP[1], reference(2), ["s0"]))
    )
    assert set(first) == {A} and set(second) == {A, B} and first[A] is second[A]
    assert all(torch.equal(second[site], only[site]) for site in (A, B))


@torch.no_grad()
def test_a_strategy_sees_the_reference_without_its_noised_copies() -> None:
    model, image = model_of(Wants(Needs((A,), "matched")), Wants(Needs())), reference(2)
    for condition in model.conditions(STEP[1], image, model.active).values():
        seen = condition.shared[0]
        assert seen.noisy is None and image.noisy is not None
        assert seen.latent is image.latent and seen.embedding is image.embedding
    with pytest.raises(AssertionError, match=r"set Reference\.noisy"):
        model(*STEP, PROMPT, replace(image, noisy=None))
    model.active = ("s1",)
    model(*STEP, PROMPT, replace(image, noisy=None))  # nobody needs it


@torch.no_grad()
def test_conditions_that_are_constant_are_made_once_and_handed_on() -> None:
    model, image = model_of(*(Wants(n) for n in (Needs(), Needs((A,)), Needs((B,), "matched")))), reference(2)
    calls = passes(model)
    constant = model.constant_conditions(image)
    assert set(constant) == {"s0", "s1"} and calls == [CLEAN]
    made: list[str] = []
    for name in model.active:
        model.strategy.part(name).register_forward_hook(lambda *_, name=name: made.append(name))
    expected = model(*STEP, PROMPT, image).output
    assert made == ["s0", "s1", "s2"] and calls[1:] == [MATCHED, CLEAN, VIDEO]
    assert torch.equal(model(*STEP, PROMPT, image, constant).output, expected)
    assert made[3:] == ["s2"] and calls[4:] == [MATCHED, VIDEO]


# ---- sites -------------------------------------------------------------------------------------------------


def test_sites_match_by_glob_port_and_role() -> None:
    sites = sites_of(*dit().sites())
    assert [s.name for s in sites.match("blocks.[13].attn1", port="qkv")] == [
        "blocks.1.attn1",
        "blocks.3.attn1",
    ]
    assert len(sites.match("*", role="temporal")) == 5
    assert sites.match("*") == list(sites) == list(sites.items) and len(sites.items) == 18
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
