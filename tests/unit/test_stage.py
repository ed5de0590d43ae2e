"""What a stage trains: schedule, active strategies, globs, frozen parameters; and the averages it ends with."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_booth.components import build
from dit_booth.config import DataConfig, RunConfig, StageConfig, StagesConfig
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.weights import write
from dit_booth.training.ema import Ema
from dit_booth.training.stage import (
    active_strategies,
    check_starts,
    frames_of_training,
    schedule_of,
    set_trainable,
    trainable_globs,
)

torch.set_num_threads(1)


def config_of(strategy: str, **more: Any) -> RunConfig:
    return RunConfig(
        strategy=strategy,
        backbone="unet",
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=12, frames=3),
        unet=UNetConfig(
            channels=(8, 16), norm_groups=4, heads=2, layers_per_block=1, down_attention=(True, True)
        ),
        **more,
    )


@cache
def root_of(strategy: str) -> Any:
    return build(config_of(strategy)).model


BOTH = "token_replacement+kv_concat"


# ---- schedule and active strategies ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "schedule", "active"),
    [
        (BOTH, ("coarse", "fine"), [("token_replacement",), ("token_replacement", "kv_concat")]),
        (
            "kv_concat+token_replacement",
            ("coarse", "fine"),
            [("token_replacement",), ("kv_concat", "token_replacement")],
        ),
        ("kv_concat", ("fine",), [("kv_concat",)]),
        ("token_replacement", ("coarse",), [("token_replacement",)]),
        ("none", (), []),
    ],
)
def test_schedule_and_active_strategies_follow_from_what_is_trained(
    strategy: str, schedule: tuple[str, ...], active: list[tuple[str, ...]]
) -> None:
    config = config_of(strategy)
    assert schedule_of(config) == schedule
    assert [active_strategies(config, schedule, i) for i in range(len(schedule))] == active


def test_a_training_has_as_many_frames_as_its_longest_crop() -> None:
    crops = StagesConfig(coarse=StageConfig(frames=1), fine=StageConfig(frames=(1, 2)))
    assert frames_of_training(config_of(BOTH, stages=crops)) == 2
    assert frames_of_training(config_of(BOTH)) == frames_of_training(config_of("none")) == 3
    images = config_of(BOTH, stages=crops, schedule=("images", "coarse"))
    assert frames_of_training(images) == 1, "single frames are not videos"


def test_a_configured_schedule_is_taken_as_it_is() -> None:
    config = config_of(BOTH, schedule=("base", "joint"))
    schedule = schedule_of(config)
    assert schedule == ("base", "joint")
    assert active_strategies(config, schedule, 0) == ()
    assert active_strategies(config, schedule, 1) == ("token_replacement", "kv_concat")
    fine_only = config_of(BOTH, schedule=("fine",))
    assert active_strategies(fine_only, ("fine",), 0) == ("kv_concat",)


def test_configured_strategies_of_a_stage() -> None:
    stages = StagesConfig(fine=StageConfig(strategies=("kv_concat",)))
    config = config_of(BOTH, stages=stages)
    assert active_strategies(config, ("coarse", "fine"), 1) == ("kv_concat",)
    wrong = config_of(BOTH, stages=StagesConfig(fine=StageConfig(strategies=("adaln",))))
    with pytest.raises(ValueError, match=r"stages\.fine\.strategies names 'adaln'.*add it with \+"):
        active_strategies(wrong, ("coarse", "fine"), 1)


# ---- stages without steps ----------------------------------------------------------------------------------


def names_of(*prefixes: str) -> set[str]:
    """The strategies' parameters under these, as a source names them."""
    return {
        name.removeprefix("strategy.") for name in under(root_of(BOTH), *(f"strategy.{p}" for p in prefixes))
    }


def check(loaded: set[str], coarse: int, fine: int, **more: Any) -> None:
    stages = StagesConfig(coarse=StageConfig(steps=coarse), fine=StageConfig(steps=fine))
    check_starts(config_of(BOTH, **{"stages": stages, **more}), root_of(BOTH), loaded)


def test_a_stage_without_steps_takes_what_the_files_have_or_is_refused() -> None:
    mapper, taps = names_of("token_replacement.mapper"), names_of("token_replacement.taps")
    fine = names_of("kv_concat.")
    check(mapper | taps | fine, 0, 0)
    for loaded, says in (
        (mapper | taps, rf"stages\.fine\.steps is 0, but .* has kv_concat\.taps \({len(fine)} parameters\)"),
        (mapper | fine, r"stages\.coarse\.steps is 0, but .* has token_replacement\.taps \("),
        (mapper | taps | set(list(fine)[1:]), r"kv_concat\.taps \(1 parameters\)"),
        (set[str](), r"has token_replacement\.mapper \(\d+ parameters\), token_replacement\.taps \("),
    ):
        with pytest.raises(ValueError, match=says):
            check(loaded, 0, 0)


def test_a_stage_before_it_is_a_source_and_one_after_it_may_mean_the_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fine = names_of("kv_concat.")
    with caplog.at_level(logging.INFO):
        check(set(), 3, 3)
        check(fine, 3, 0)
        check(set(), 3, 3, schedule=("base", "coarse", "fine"))
        check(set(), 0, 0, schedule=("base",), stages=StagesConfig(base=StageConfig(steps=0)))
        assert not caplog.records
        check(names_of("token_replacement.mapper"), 0, 3)
    (record,) = caplog.records
    assert "stage coarse has 0 steps, and no file has token_replacement.taps (" in record.message
    assert "mapper" not in record.message and record.message.endswith("that stays at its start")
    with pytest.raises(ValueError, match=r"stages\.fine\.steps is 0"):
        check(set(), 3, 0)


def test_only_what_the_stage_would_train_must_come_from_a_file() -> None:
    some = StagesConfig(fine=StageConfig(steps=0, train=("strategy.kv_concat.*.to_v_*",)))
    keys = {name for name in names_of("kv_concat.") if ".to_k_" in name}
    check(names_of("kv_concat.") - keys, 0, 0, schedule=("fine",), stages=some)
    with pytest.raises(ValueError, match=r"kv_concat\.taps"):
        check(keys, 0, 0, schedule=("fine",), stages=some)


def test_what_the_files_had_is_known_of_a_build(tmp_path: Path) -> None:
    state = {name.removeprefix("strategy."): p for name, p in root_of(BOTH).named_parameters()}
    coarse = {name: p for name, p in state.items() if name.startswith("token_replacement.")}
    write(tmp_path / "strategy.safetensors", coarse)
    components = build(config_of(BOTH, strategy_weights=(str(tmp_path / "strategy.safetensors"),)))
    assert components.loaded == set(coarse)
    assert build(config_of(BOTH)).loaded == set()


# ---- globs -------------------------------------------------------------------------------------------------


def trained(config: RunConfig, name: Any, active: tuple[str, ...]) -> set[str]:
    root = root_of(config.strategy)
    return set(set_trainable(root, trainable_globs(config, root, name, active)))


def under(root: nn.Module, *prefixes: str) -> set[str]:
    found = {name for name, _ in root.named_parameters() if name.startswith(prefixes)}
    assert found
    return found


def test_stages_train_what_the_strategies_declare() -> None:
    config, root = config_of(BOTH), root_of(BOTH)
    coarse, fine = under(root, "strategy.token_replacement."), under(root, "strategy.kv_concat.")
    both = ("token_replacement", "kv_concat")
    assert trained(config, "coarse", ("token_replacement",)) == coarse
    assert trained(config, "fine", both) == fine
    assert trained(config, "joint", both) == coarse | fine
    assert trained(config, "base", ()) == under(root, "backbone.")
    assert trained(config, "images", ()) == under(root, "backbone.")


def test_finetune_coarse_adds_what_the_coarse_stage_trains() -> None:
    config = config_of(BOTH, stages=StagesConfig(fine=StageConfig(finetune_coarse=True)))
    root = root_of(BOTH)
    everything = under(root, "strategy.")
    assert trained(config, "fine", ("token_replacement", "kv_concat")) == everything
    assert trained(config, "fine", ("kv_concat",)) == under(root, "strategy.kv_concat."), (
        "an inactive one stays"
    )


def test_configured_globs_replace_the_declared_ones() -> None:
    stages = StagesConfig(fine=StageConfig(train=("strategy.kv_concat.*.to_v_*", "backbone.conv_in.*")))
    names = trained(config_of(BOTH, stages=stages), "fine", ("kv_concat",))
    assert {n.split(".")[-2] for n in names} == {"to_v_new", "to_v_exemplar", "conv_in"}


def test_a_stage_that_trains_nothing_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"stage 'coarse' trains nothing.*'kv_concat'.*--stages\.coarse\.train"
    ):
        trainable_globs(config_of("kv_concat"), root_of("kv_concat"), "coarse", ("kv_concat",))
    with pytest.raises(ValueError, match=r"stage 'fine' trains nothing"):
        trainable_globs(config_of("none"), root_of("none"), "fine", ("none",))


def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_names() -> None:
    root = root_of(BOTH)
    with pytest.raises(
        ValueError, match=r"train glob 'backbone\.conv_inn\.weight' matches none of the \d+"
    ) as e:
        set_trainable(root, ["strategy.*", "backbone.conv_inn.weight"])
    assert "nearest: backbone.conv_in.weight" in str(e.value)


def test_set_trainable_freezes_the_rest_and_thaws_what_was_frozen() -> None:
    root = root_of(BOTH)
    set_trainable(root, ["backbone.*"])
    chosen = set_trainable(
        root, ["strategy.kv_concat.*", "strategy.kv_concat.*.to_k_new.weight", "text.ln_final.*"]
    )
    state = {name: p.requires_grad for name, p in root.named_parameters()}
    assert {name for name, on in state.items() if on} == set(chosen)
    assert set(chosen) == under(root, "strategy.kv_concat.", "text.ln_final.")
    parameters = dict(root.named_parameters())
    assert all(chosen[name] is parameters[name] for name in chosen)


def test_globs_are_case_sensitive_and_match_whole_names() -> None:
    module = nn.ModuleDict({"aB": nn.Linear(1, 1), "ab": nn.Linear(1, 1)})
    assert set(set_trainable(module, ["ab.*"])) == {"ab.weight", "ab.bias"}
    with pytest.raises(ValueError, match="matches none of the 4"):
        set_trainable(module, ["weight"])


# ---- averages ----------------------------------------------------------------------------------------------


def test_ema_follows_the_closed_form() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    ema, expected = Ema({"p": parameter}, decay=0.5), 0.0
    for step in range(1, 12):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
        assert ema.shadow["p"].dtype == torch.float32
        assert ema.shadow["p"].tolist() == pytest.approx([expected] * 3, rel=1e-5)
    ema.copy_to_parameters()
    assert torch.equal(parameter.data, ema.shadow["p"].bfloat16())


def test_ema_starts_as_a_copy() -> None:
    parameter = nn.Parameter(torch.ones(2))
    ema = Ema({"p": parameter}, decay=0.9)
    parameter.data.zero_()
    assert ema.shadow["p"].tolist() == [1, 1]


def test_stage_config_errors() -> None:
    for options, says in (
        ({"steps": -1}, "steps is -1"),
        ({"drop": 1.5}, "drop is 1.5"),
        ({"lr": 0.0}, "lr is 0.0"),
    ):
        with pytest.raises(ValueError, match=says):
            replace(StageConfig(), **options)
