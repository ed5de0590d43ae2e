"""The promises of every registered strategy, on every backbone and layout; and combinations that the study needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import dit_booth.strategies as strategies
import pytest
import torch
from dit_booth.strategies.in_context import InContextConfig
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.lora import LoraConfig
from dit_booth.strategies.query_projection import QueryProjectionConfig
from dit_booth.strategies.spatial_concat import SpatialConcatConfig
from dit_booth.strategies.token_bank import TokenBankConfig
from dit_booth.strategies.token_replacement import TokenReplacementConfig

from dit_booth.inject import KV, Condition, Hidden, Reference
from dit_booth.models.weights import load_strictly
from dit_booth.strategy import Strategy, StrategyConfig, registered
from dit_booth.testing import BACKBONES, PROMISES, check_strategy, promises, trial, worst

torch.set_num_threads(1)
QUICK = [promise for promise in PROMISES if promise is not promises.compiled_is_the_same]
OF_SUMS = [
    promises.identity_is_as_declared,
    promises.gradients_reach_what_is_trained,
    promises.saved_and_loaded_is_the_same,
    promises.image_matters_as_declared,
    promises.condition_is_a_pure_function,
]
"""Promises that a combination or an option may break."""
OF_LAYOUTS = [
    p for p in QUICK if p not in (promises.backbone_is_untouched, promises.saved_and_loaded_is_the_same)
]
COMPILED_SUMS = (
    "none",
    "lvdm",  # it trains the whole backbone, of which others leave out a part
    "spatial_concat",  # it trains projections of the backbone, some of which others replace
    "token_replacement+kv_concat+adaln+decoupled_attention+token_bank+query_projection",
    "in_context+channel_concat+elite_local+image_to_video+lora+textual_inversion+vace",
)
STAND_IN = KVConcatConfig(
    projections="low_rank",
    rank=2,
    train_frame_kv=False,
    update="direct",
    reference_at="all",
    reference_noise="clean",
)
SUMS: dict[str, tuple[str, dict[str, StrategyConfig]]] = {
    "videobooth": ("videobooth", {}),
    "elite": ("elite", {"token_replacement": TokenReplacementConfig(words=1)}),
    "clean": (
        "kv_concat",
        {"kv_concat": KVConcatConfig(reference_noise="clean", update="direct", reference_at="all")},
    ),
    "stand-in": ("kv_concat", {"kv_concat": STAND_IN}),
    "low-rank changes beside an image": (
        "kv_concat+lora",
        {
            "kv_concat": KVConcatConfig(train_frame_kv=False),
            "lora": LoraConfig(rank=2, layers=("*.to_*", "*.[mf][lf]*.*")),
        },
    ),
    "pooled": ("token_bank", {"token_bank": TokenBankConfig(source="latent", kind="pool", pool=2)}),
    "resampled hidden states": (
        "token_bank",
        {"token_bank": TokenBankConfig(source="latent", tokens=4, depth=1, reference_noise="matched")},
    ),
    "a bank for each site": ("token_bank", {"token_bank": TokenBankConfig(tokens=5, depth=1, per_site=True)}),
    "both ways": ("in_context", {"in_context": InContextConfig(one_way=False, place="after")}),
    "magref": ("channel_concat+token_bank", {"token_bank": TokenBankConfig(tokens=4, depth=1)}),
    "a side branch and words": ("token_replacement+vace", {}),
    "with text": ("spatial_concat", {"spatial_concat": SpatialConcatConfig(skip_text=False)}),
    "everything at once": (
        "token_replacement+kv_concat+adaln+decoupled_attention+token_bank+query_projection",
        {"token_bank": TokenBankConfig(tokens=4, depth=1)},
    ),
    "a reference in two ways": ("in_context+decoupled_attention+adaln", {}),
    "known frames after a reference": ("in_context+lvdm", {}),
    "known frames above a reference": (
        "lvdm+spatial_concat",
        {"spatial_concat": SpatialConcatConfig(skip_text=False)},
    ),
    "a picture in two ways": (
        "token_replacement+spatial_concat",
        {"spatial_concat": SpatialConcatConfig(skip_text=False)},
    ),
}
SYSTEMS_ON_WAN = (
    "stand-in",
    "magref",
    "both ways",
    "a side branch and words",
    "low-rank changes beside an image",
)
"""Sums that are published on Wan; each strategy alone is checked there, too."""
QUERIES: dict[str, tuple[str, dict[str, StrategyConfig]]] = {
    f"{mode} queries, {with_}": (
        f"{with_}+query_projection",
        {"query_projection": QueryProjectionConfig(**more)},
    )
    for with_ in ("kv_concat", "token_bank", "decoupled_attention")
    for mode, more in {
        "shared": {"mode": "shared"},
        "separate": {"mode": "separate"},
        "low-rank": {"mode": "lora", "rank": 2},
        "frozen": {"mode": "frozen"},
    }.items()
}
QUERIES_ON_UNET = {
    "shared queries, kv_concat",
    "low-rank queries, kv_concat",
    "frozen queries, token_bank",
    "separate queries, decoupled_attention",
}
# On the U-Net the text is what decoupled attention reads beside; elsewhere it is the frames.
TEXT_QUERIES = QueryProjectionConfig(mode="separate", where="*.attn2")


@pytest.mark.parametrize("promise", QUICK, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
@pytest.mark.parametrize("name", registered())
def test_promise(name: str, backbone: str, promise: Callable[..., None]) -> None:
    check_strategy(name, backbones=[backbone], promises=[promise])


@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - {"dit-factorised", "unet"}))
@pytest.mark.parametrize("name", registered())
def test_promises_on_other_layouts(name: str, backbone: str) -> None:
    """Those that depend on the order in which a DiT attends: building, saving and loading know nothing of it."""
    check_strategy(name, backbones=[backbone], promises=OF_LAYOUTS)


@pytest.mark.parametrize(
    ("case", "backbone"),
    [*product(SUMS, ("dit-factorised", "unet")), *((case, "wan") for case in SYSTEMS_ON_WAN)],
)
def test_promises_of_a_sum(case: str, backbone: str) -> None:
    check_sum(case, backbone)


@pytest.mark.parametrize("case", QUERIES)
def test_promises_of_queries_with_a_reader(case: str) -> None:
    """Every kind of queries beside every reader on the DiT; `QUERIES_ON_UNET` has each kind and each reader once."""
    for backbone in ("dit-factorised", *(["unet"] if case in QUERIES_ON_UNET else [])):
        check_sum(case, backbone)


def check_sum(case: str, backbone: str) -> None:
    names, options = {**SUMS, **QUERIES}[case]
    if case == "separate queries, decoupled_attention" and backbone == "unet":
        options = {"query_projection": TEXT_QUERIES}
    check_strategy(names, backbones=[backbone], options=options, promises=OF_SUMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "names"),
    [
        *product(("dit-factorised", "unet"), COMPILED_SUMS),
        *(("wan", names) for names in COMPILED_SUMS[1:]),
    ],
)
def test_compiled(names: str, backbone: str) -> None:
    """All strategies in few sums: the compiler goes through the taps of each."""
    check_strategy(names, backbones=[backbone], promises=[promises.compiled_is_the_same])


@pytest.mark.parametrize("names", COMPILED_SUMS)
def test_sums_on_wan_leave_it_untouched_and_are_saved(names: str) -> None:
    check_strategy(
        names,
        backbones=["wan"],
        promises=[promises.backbone_is_untouched, promises.saved_and_loaded_is_the_same],
    )


def test_the_compiled_sums_leave_no_strategy_out() -> None:
    assert {name for names in COMPILED_SUMS for name in names.split("+")} == set(registered())


# ---- the checks find what they are for ---------------------------------------------------------------------


KV_CONCAT = registered()["kv_concat"].forward


def _changed(condition: Condition, by: float) -> Condition:
    return replace(condition, at={at: KV(kv.k + by, kv.v) for at, kv in condition.at.items()})


def _draws(self: Strategy, reference: Reference, hidden: Hidden) -> Condition:
    return _changed(KV_CONCAT(self, reference, hidden), torch.randn(()).item())


def _counts(self: Strategy, reference: Reference, hidden: Hidden) -> Condition:
    self.calls = getattr(self, "calls", 0) + 1
    return _changed(KV_CONCAT(self, reference, hidden), self.calls)


BROKEN: dict[str, tuple[str, dict[str, Any]]] = {
    "it says identity": ("identity_is_as_declared", {"identity_at_init": True}),
    "it trains less": ("gradients_reach_what_is_trained", {"trains": {"fine": ("taps.blocks.0.*",)}}),
    "it says no image": ("image_matters_as_declared", {"reads_image": False}),
    "it draws at random": ("condition_is_a_pure_function", {"forward": _draws}),
    "it counts its calls": ("condition_is_a_pure_function", {"forward": _counts}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_false_declaration_is_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    promise, lies = BROKEN[case]
    kv_concat = registered()["kv_concat"]
    for attribute, value in lies.items():
        monkeypatch.setattr(kv_concat, attribute, value)
    with pytest.raises(AssertionError, match=f"kv_concat on dit-factorised: {promise}: "):
        check_strategy(kv_concat, backbones=["dit-factorised"], promises=[getattr(promises, promise)])


# ---- composition -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
@torch.no_grad()
def test_an_inactive_strategy_is_as_if_it_were_not_there(backbone: str) -> None:
    both, one = trial("token_replacement+kv_concat", backbone).perturb(), trial("kv_concat", backbone)
    load_strictly(
        one.model.strategy,
        {k: v for k, v in both.model.strategy.state_dict().items() if k.startswith("kv_concat.")},
        "x",
    )
    together = both(both.reference())
    both.model.active = ("kv_concat",)
    prediction = both.model(both.x, both.t, both.prompt, both.reference())
    assert torch.equal(prediction.output, one(one.reference()))
    assert prediction.aux_loss == 0, "token replacement's auxiliary loss"
    assert worst(together, prediction.output) > 1e-5


def test_a_strategy_is_a_short_file() -> None:
    lines = {
        file.name: len(file.read_text().splitlines())
        for file in Path(strategies.__file__).parent.glob("*.py")
    }
    assert {"token_replacement.py", "kv_concat.py"} < lines.keys()
    assert max(lines.values()) <= 120, lines
