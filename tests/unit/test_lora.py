"""Strategy `lora`: low-rank changes of any linear layer, equal to changed weights; and the port that it uses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_booth.strategies.lora import LoraConfig

from dit_booth.config import RunConfig
from dit_booth.inject import Projection, Site
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.layers import Linear, linear_sites
from dit_booth.testing import Trial, trial, worst
from dit_booth.training.stage import active_strategies, trainable_globs

torch.set_num_threads(1)
ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out*")
MLP = {"unet": "*.ff.*", "wan": "*.ffn.*"}
DIT = DiTConfig(depth=2, hidden=32, heads=2)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dit": ("dit-cross_attention", {}),
    "text takes part": ("dit-factorised", {"dit": replace(DIT, conditioning="in_context", mlp="swiglu")}),
    "unet": ("unet", {}),
    "wan": ("wan", {}),
}


def adapted(backbone: str, *layers: str, **settings: Any) -> Trial:
    options = LoraConfig(rank=2, alpha=3.0, layers=layers)
    return trial("lora", backbone, options={"lora": options}, **settings).perturb()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_is_a_change_of_the_weights(case: str) -> None:
    backbone, settings = CASES[case]
    run = adapted(backbone, *ATTENTION, MLP.get(backbone, "*.mlp.*"), **settings)
    output, plain = run(run.reference()), run.plain()
    taps = run.model.strategy.part("lora").attached
    assert taps.keys() == {site.name for site in linear_sites(run.model.backbone)}, "every layer is reached"
    for name, tap in taps.items():
        run.model.backbone.get_submodule(name).weight += 3.0 / 2 * tap.up.weight @ tap.down.weight
    assert worst(run.plain(), output) < 2e-5 * max(1.0, output.abs().max().item())
    assert worst(output, plain) > 1e-2


def test_a_layer_outside_a_backbone_has_no_taps() -> None:
    layer, x = Linear(3, 2), torch.randn(4, 3)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
def test_queries_and_values_keep_their_names_and_start(backbone: str) -> None:
    """Adapters and addresses of earlier runs stand for these tensors."""
    state = trial("lora", backbone).model.strategy.state_dict()
    at, sums = {
        "dit-factorised": ("blocks.0.attn1", (0.046201, 1.337935)),
        "unet": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", (2.224068, -0.800805)),
    }[backbone]
    kinds = ("q.down", "q.up", "v.down", "v.up")
    assert list(state)[:4] == [f"lora.taps.{at}.{kind}.weight" for kind in kinds]
    assert {name.rpartition(".attn")[2].partition(".")[2] for name in state} == {f"{k}.weight" for k in kinds}
    for kind, expected in zip("qv", sums, strict=True):
        assert state[f"lora.taps.{at}.{kind}.down.weight"].sum().item() == pytest.approx(expected, abs=1e-5)


def test_globs_choose_the_layers() -> None:
    def layers(**options: Any) -> set[str]:
        run = trial("lora", options={"lora": LoraConfig(rank=1, **options)})
        return {name.removeprefix("blocks.") for name in run.model.strategy.part("lora").attached}

    assert layers(layers=("*.attn1.to_q", "*.mlp.*")) == {
        *("0.attn1.to_q", "0.mlp.0", "0.mlp.2", "1.attn1.to_q", "1.mlp.0", "1.mlp.2")
    }
    assert layers(where="blocks.1.attn_temp") == {"1.attn_temp.to_q", "1.attn_temp.to_v"}
    for options, said in (
        (
            {"layers": ("*.to_k", "*.ff.*")},
            r"site glob '\*\.ff\.\*' matches none of the 20 sites of port linear",
        ),
        ({"where": "*.attn3"}, r"site glob '\*\.attn3\.\*' matches none"),
        (
            {"where": "*.mlp"},
            r"lora\.layers \*\.to_q \*\.to_v and lora\.where \*\.mlp have no layer in common",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            layers(**options)
    with pytest.raises(ValueError, match=r"lora\.layers is empty"):
        LoraConfig(layers=())


def test_a_stages_settings_say_where_it_trains() -> None:
    settings: dict[str, Any] = {
        "strategy": "token_replacement+lora",
        "stages": {"coarse": {"strategies": ["token_replacement", "lora"], "train": ["strategy.lora.*"]}},
    }
    config = RunConfig.create("demo", **settings)
    assert active_strategies(config, ("coarse", "fine"), 0) == ("token_replacement", "lora")
    run = trial("token_replacement+lora", stages=config.stages)
    active = ("token_replacement", "lora")
    assert trainable_globs(run.components.config, run.model, "coarse", active) == ("strategy.lora.*",)


def test_a_payload_is_what_the_layer_makes() -> None:
    run, seen = trial("none"), []

    def look(payload: Projection, image: object) -> Projection:
        seen.append(payload)
        return payload

    site = next(site for site in linear_sites(run.model.backbone) if site.name == "blocks.1.mlp.2")
    assert isinstance(site, Site) and (site.port, site.dim) == ("linear", 32)
    inject = run.model.strategy.bind(())
    inject.taps = {site.name: [(look, None)]}
    run.model.backbone(run.x, run.t, run.model.text(run.prompt), inject)
    (payload,) = seen
    assert payload.x.shape == (2, 3, 4, 128) and payload.y.shape == (2, 3, 4, 32)
    assert torch.equal(payload.y, site.projections["linear"](payload.x))
