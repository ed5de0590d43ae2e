"""What strategies need of the reference, and the passes that record it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from spies import dit, sites_of
from torch import Tensor, nn

from dit_booth.inject import (
    QKV,
    Condition,
    Hidden,
    Injection,
    Modulation,
    Needs,
    Noise,
    Recorder,
    Reference,
    Site,
    no_injection,
)
from dit_booth.models.clip.encoders import Prompt, Text
from dit_booth.models.injected import Injected
from dit_booth.strategy import Strategies, Strategy, StrategyConfig

torch.set_num_threads(1)


class Wants(Strategy):
    """A strategy of given needs, whose condition holds its arguments."""

    def __init__(self, needs: Needs) -> None:
        super().__init__(StrategyConfig(), sites_of())
        self.wanted, self.asked = needs, 0

    def needs(self) -> Needs:
        self.asked += 1
        return self.wanted

    def forward(self, reference: Reference, hidden: Hidden) -> Condition:
        return Condition(shared=(reference, dict(hidden)))


def reference(batch: int = 1) -> Reference:
    e = torch.ones(batch, 2)
    return Reference(e, (), e, torch.zeros(batch, 1, 3, 4, 6), torch.ones(batch, 1, 3, 4, 6))


def test_conditions_are_made_of_the_active_strategies_needs_alone() -> None:
    parts = {
        "a": Wants(Needs(("x",), "clean")),
        "b": Wants(Needs(("x", "y"), "matched", frames=3)),
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
    assert strategies.reference_frames(["a", "b"]) == 3
    assert strategies.reference_frames(["a", "c"]) == strategies.reference_frames([]) == 1
    assert [part.asked for part in parts.values()] == [1, 1, 1], "a strategy tells its needs once"


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
