"""DiT (with its guidance) and Latte: every stored output, from the weights under their official names."""

from __future__ import annotations

import pytest
import torch
from dit_cases import build, cases
from files import has, load

torch.set_num_threads(1)
DIT, LATTE = ("dit_sigma", "dit_nosigma"), ("latte_extras1", "latte_extras2", "latte_extras78")


@pytest.mark.parametrize("name", [name for name in (*DIT, *LATTE) if has(name)])
def test_every_output_equals_the_original(name: str) -> None:
    results = list(cases(*load(name)))
    expected = {"out", "cfg", "t_emb", "x_emb"} if name in DIT else {"out", "cfg"}
    assert {r.name.removesuffix(" float64") for r in results} == expected
    assert all(r.ok and r.tolerance < 2e-4 for r in results), [r for r in results if not r.ok]


@pytest.mark.parametrize("name", DIT)
def test_the_errors_are_within_2e5(name: str) -> None:
    """What the project promises for DiT, in absolute terms."""
    assert all(r.error <= 2e-5 for r in cases(*load(name)))


@torch.no_grad()
def test_a_changed_weight_is_noticed() -> None:
    info, tensors = load("dit_sigma")
    name = "weights.blocks.1.attn.qkv.weight"
    assert not all(r.ok for r in cases(info, {**tensors, name: tensors[name] + 1e-3}))


def test_blocks_take_turns_in_latte_and_have_no_time_in_dit() -> None:
    def of(name: str) -> list[tuple[bool, bool]]:
        blocks = build(*_weights(name)).blocks
        return [(block.attn1 is not None, block.attn_temp is not None) for block in blocks]

    assert of("latte_extras1") == [(True, False), (False, True)] * 2
    assert of("dit_sigma") == [(True, False)] * 3


def _weights(name: str):  # type: ignore[no-untyped-def]
    info, tensors = load(name)
    return info, {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
