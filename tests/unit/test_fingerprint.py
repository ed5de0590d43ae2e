"""What strategy.safetensors says of itself, and what is said where it is loaded on another base."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from safetensors import safe_open

from dit_booth.models.fingerprint import differences, fingerprint, metadata, short, warn_of_another_base
from dit_booth.models.weights import part, write
from dit_booth.testing import Trial, trial

torch.set_num_threads(1)


def about(run: Trial) -> dict[str, str]:
    return metadata(run.model.backbone, run.model.strategy)


def said(saved: dict[str, str], run: Trial) -> list[str]:
    return differences(saved, run.model.backbone, run.model.strategy)


def test_it_holds_names_options_and_the_base() -> None:
    run = trial("token_replacement+kv_concat", options={"kv_concat": KVConcatConfig(update="direct")})
    found = about(run)
    assert found["strategy"] == "token_replacement+kv_concat"
    options = json.loads(found["options"])
    assert list(options) == ["token_replacement", "kv_concat"]
    assert options["kv_concat"]["update"] == "direct"
    assert set(json.loads(found["base_parameters"])) == {n for n, _ in run.model.backbone.named_parameters()}
    assert len(found["base"]) == 12
    assert said(found, run) == []


def test_the_fingerprint_is_of_names_shapes_and_values() -> None:
    run = trial("none").model.backbone
    before = fingerprint(run)
    assert before["blocks.0.attn1.to_k.weight"].startswith("32x32:")
    assert fingerprint(run.double()) == before, "the same numbers"
    with torch.no_grad():
        run.get_parameter("blocks.1.attn1.to_k.bias")[3] += 1e-6
    after = fingerprint(run)
    assert {name for name in before if before[name] != after[name]} == {"blocks.1.attn1.to_k.bias"}
    assert short(after) != short(before)
    with torch.device("meta"):
        large = torch.nn.Linear(2000, 2000)
    assert list(fingerprint(large.to_empty(device="cpu"))) == ["weight", "bias"]


def test_another_base_is_described() -> None:
    run = trial("kv_concat")
    found = about(run)
    with torch.no_grad():
        for name in ("x_embedder.proj.bias", "blocks.0.attn1.to_q.weight"):
            run.model.backbone.get_parameter(name).add_(1)
    (line,) = said(found, run)
    assert f"trained on base {found['base']}, this is {short(fingerprint(run.model.backbone))}" in line
    assert "2 have other values (blocks.0.attn1.to_q.weight, x_embedder.proj.bias)" in line
    other = said(found, trial("kv_concat", "unet"))[0]
    assert "are missing here" in other and "are new here" in other and "conv_in.weight" not in other[:40]
    wide = said(about(trial("kv_concat", "dit-interleaved")), trial("kv_concat", "dit-factorised"))[0]
    assert "blocks.0.modulation.linear.weight: 192x32 there, 288x32 here" in wide


def test_other_options_are_named() -> None:
    found = about(trial("kv_concat"))
    options = {"kv_concat": KVConcatConfig(reference_at="all")}
    assert said(found, trial("kv_concat", options=options)) == [
        "kv_concat.reference_at was 'first', here it is 'all'"
    ]
    assert said({}, trial("kv_concat")) == [], "a file of an older version"


def test_a_file_is_compared_where_it_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = trial("kv_concat")
    write(tmp_path / "strategy.safetensors", part(run.model.state_dict(), "strategy."), about(run))
    with safe_open(tmp_path / "strategy.safetensors", "pt") as file:
        assert file.metadata() == about(run)
    arguments: tuple[Any, Any] = (run.model.backbone, run.model.strategy)
    assert warn_of_another_base(tmp_path, *arguments) == [] and not caplog.records
    with torch.no_grad():
        run.model.backbone.get_parameter("x_embedder.proj.bias").add_(1)
    with caplog.at_level(logging.WARNING):
        assert len(warn_of_another_base(str(tmp_path / "strategy.safetensors"), *arguments)) == 1
    assert str(tmp_path / "strategy.safetensors") in caplog.text and "1 have other values" in caplog.text
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for quiet in ("broken.safetensors", "mapper.pt", "not-there"):
        assert warn_of_another_base(tmp_path / quiet, *arguments) == []
