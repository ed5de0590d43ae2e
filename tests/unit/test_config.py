"""A run's configuration: what is refused, what a run folder is called, and what makes two runs different."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dit_booth.config import (
    DataConfig,
    LongConfig,
    RunConfig,
    SampleConfig,
    StageConfig,
    StagesConfig,
    StartConfig,
    SubjectConfig,
    ToyworldOptions,
    TrainConfig,
    TripletsOptions,
    decisive,
)
from dit_booth.config.parse import parse
from dit_booth.data.toyworld import Toyworld
from dit_booth.diffusion.clip_sampling import ClipsConfig
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.known_frames import KnownFramesConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.files import packaged
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.dit.config import DiTConfig
from dit_booth.models.text.config import TextConfig
from dit_booth.models.unet.config import UNetConfig
from dit_booth.models.wan.config import WanConfig
from dit_booth.strategy import registered


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DataConfig(kind="triplets"), ("data.triplets.root", "empty", "folder")),
        (lambda: DataConfig(frames=0), ("data.frames is 0", "[1, 10000]")),
        (lambda: DataConfig(frames=10**8), ("data.frames is 100000000", "[1, 10000]")),
        (lambda: DataConfig(size=4), ("data.size is 4", "[8, 8192]")),
        (lambda: DataConfig(image_size=4), ("data.image_size is 4", "8 or more")),
        (lambda: DataConfig(workers=-1), ("data.workers is -1", "[0, 256]")),
        (lambda: DataConfig(workers=100_000), ("data.workers is 100000", "[0, 256]")),
        (lambda: TripletsOptions(stride=0), ("data.triplets.stride is 0", "[1, 10000]")),
        (lambda: TripletsOptions(max_broken=-1), ("data.triplets.max_broken is -1", "a whole number")),
        (lambda: StageConfig(steps=-1), ("steps is -1", "a whole number in [0, ")),
        (lambda: StageConfig(drop=1.5), ("drop is 1.5", "[0, 1]")),
        (lambda: StageConfig(drop_image=-0.1), ("drop_image is -0.1", "[0, 1]")),
        (
            lambda: StageConfig(drop=0.5, drop_image=0.3, drop_text=0.3),
            ("drop 0.5 + drop_image 0.3 + drop_text 0.3 is more than 1", "lower one"),
        ),
        (lambda: StageConfig(lr=0.0), ("lr is 0.0", "(0, 1000]")),
        (lambda: StageConfig(lr=float("inf")), ("lr is inf", "(0, 1000]")),
        (lambda: StageConfig(lr=float("nan")), ("lr is nan", "(0, 1000]")),
        (lambda: TrainConfig(batch_size=0), ("train.batch_size is 0", "[1, 1000000]")),
        (lambda: TrainConfig(accumulation=0), ("train.accumulation is 0", "[1, 1000000]")),
        (lambda: TrainConfig(checkpoint_every=0), ("train.checkpoint_every is 0", "[1, 1000000000]")),
        (lambda: TrainConfig(ema=1.0), ("train.ema is 1.0", "[0, 1)")),
        (lambda: TrainConfig(clip=0), ("train.clip is 0", "(0, 1000000000]")),
        (lambda: TrainConfig(clip=-1.0), ("train.clip is -1.0", "(0, 1000000000]")),
        (lambda: TrainConfig(clip=True), ("train.clip is True", "a number")),
        (lambda: TrainConfig(betas=(0.9, 1.0)), ("train.betas is (0.9, 1.0)", "[0, 1)")),
        (lambda: TrainConfig(seed=2**63), (f"train.seed is {2**63}", f"[0, {2**63 - 1}]")),
        (lambda: SampleConfig(videos=-1), ("sample.videos is -1", "[0, 1000000]")),
        (lambda: GuidanceConfig(scale=float("nan")), ("guidance.scale is nan", "[-1000, 1000]")),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_field_value_and_fix(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    assert all(word in str(caught.value) for word in words), str(caught.value)


SECTIONS = [
    *(TripletsOptions, DataConfig, StageConfig, TrainConfig, SampleConfig, ObjectiveConfig, SamplerConfig),
    *(GuidanceConfig, DiTConfig, UNetConfig, ClipConfig, AutoencoderConfig, SubjectConfig, StartConfig),
    *(KnownFramesConfig, ClipsConfig, LongConfig),
    *(TextConfig, WanConfig),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_number_of_a_section_is_finite_and_bounded(section: Any):
    for field in dataclasses.fields(section):
        kind = str(field.type)
        if not re.search(r"\b(int|float)\b", kind):
            continue
        wrong = [True, "1", -(10**30), 10**30, float("nan"), *([float("inf")] if "float" in kind else [1.5])]
        for value in wrong:
            given = (value, value) if "tuple" in kind else value
            with pytest.raises(ValueError, match=rf"\b{field.name} is .*; use a (whole )?number in [\[(]"):
                section(**{field.name: given})


NUMERIC_OPTIONS = [
    pytest.param(name, cls.Config, field, id=f"{name}.{field.name}")
    for name, cls in registered().items()
    if cls.__module__.startswith("dit_booth.strategies.")
    for field in dataclasses.fields(cls.Config)
    if field.type in (int, float)
]


@pytest.mark.parametrize(("strategy", "config", "field"), NUMERIC_OPTIONS)
def test_every_number_of_a_strategy_is_finite_and_bounded(strategy: str, config: Any, field: Any):
    wrong = [True, "1", -(10**30), 10**30, float("nan"), float("inf") if field.type is float else 1.5]
    for value in wrong:
        with pytest.raises(ValueError) as caught:
            config(**{field.name: value})
        assert f"{strategy}.{field.name} is {value!r}; use a " in str(caught.value)
        assert "\n" not in str(caught.value)


def test_sections_without_numbers_are_complete():
    """A section that is not in SECTIONS would have unbounded numbers."""
    named = {type(getattr(RunConfig(), field.name)) for field in dataclasses.fields(RunConfig)}
    sections = {cls for cls in named if dataclasses.is_dataclass(cls)}
    assert sections - {*SECTIONS} == {StagesConfig}


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().strategy = "none"  # type: ignore[misc]


def test_run_yaml_holds_plain_containers_only():
    settings = RunConfig(schedule=("joint",)).as_dict()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["schedule"] == ["joint"]
    assert settings["train"]["betas"] == [0.9, 0.999]


def test_the_run_folder_is_named_after_the_settings():
    config = RunConfig(strategy="none", backbone="unet")
    assert config.folder() == f"runs/none-unet-{config.fingerprint()}"
    assert dataclasses.replace(config, out="here").folder() == "here"


@pytest.mark.parametrize(
    "change",
    [
        {"train": TrainConfig(seed=1)},
        {"stages": StagesConfig(fine=StageConfig(lr=2e-4, drop=0.1))},
        {"sample": SampleConfig(seeds=(1,))},
        {"data": DataConfig(frames=7)},
        {"data": DataConfig(toyworld=ToyworldOptions(describe="full"))},
        {"strategy": "none"},
        {"ds_config": "zero3.json"},
        {"strategy_weights": ("mapper.pt",)},
        {"dit": DiTConfig(positions="rotary")},
    ],
)
def test_every_setting_that_changes_the_result_changes_the_folder(change):
    assert RunConfig(**change).fingerprint() != RunConfig().fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"out": "x"},
        {"data": DataConfig(workers=2)},
        {"data": DataConfig(triplets=TripletsOptions(root="x", stride=2))},
        {"train": TrainConfig(checkpoint_every=5)},
    ],
)
def test_what_changes_no_result_does_not(change):
    other = RunConfig(**change)
    assert other.fingerprint() == RunConfig().fingerprint()
    assert decisive(other.as_dict()) == decisive(RunConfig().as_dict())


def test_a_run_from_before_a_setting_came_to_its_section_goes_on():
    """Sections that are themselves later ones: of networks that the run does not have, and of its own."""
    for config in (RunConfig(), RunConfig(backbone="wan", wan=WanConfig(depth=3))):
        before = config.as_dict()
        del before["wan"]["image_encoder"]
        assert decisive(before) == decisive(config.as_dict())
    assert "wan" not in decisive(RunConfig().as_dict())


def test_decisive_leaves_its_argument_alone():
    settings = RunConfig().as_dict()
    before = json.dumps(settings)
    decisive(settings)
    assert json.dumps(settings) == before


def test_training_and_sampling_read_different_toy_worlds():
    config = DataConfig(frames=2, size=12, image_size=16)
    train, heldout = config.build(), config.build("dev")
    assert isinstance(train, Toyworld)
    assert train[0].video.shape == (2, 3, 12, 12)
    assert train[0].image.shape == (3, 16, 16)
    assert train[0].key != heldout[0].key


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path):
    missing = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data\.triplets\.root is .*none.*is not a folder"):
        DataConfig(kind="triplets", triplets=TripletsOptions(root=missing)).build()


# ---- RunConfig.create --------------------------------------------------------------------------------------


def test_create_takes_nested_settings_over_the_demo():
    config = RunConfig.create(
        strategy="kv_concat",
        kv_concat={"update": "direct"},
        stages={"fine": {"steps": 500}},
        schedule=("fine",),
    )
    flags = ["--strategy", "kv_concat", "--kv-concat.update", "direct", "--stages.fine.steps", "500"]
    demo = str(packaged("configs/demo.yaml"))
    assert config == parse([*flags, "--schedule", "fine"], default_config=demo)
    assert config.stages.coarse.frames == 3, "of the demo"


def test_create_takes_a_packaged_name_or_a_path(tmp_path: Path):
    assert RunConfig.create("toyworld_base") == parse(
        ["--config", str(packaged("configs/toyworld_base.yaml"))]
    )
    file = tmp_path / "a.yaml"
    file.write_text("data: {frames: 3}\n")
    assert RunConfig.create(file, data={"size": 16}).data == DataConfig(frames=3, size=16)
    with pytest.raises(ValueError, match=r"demmo is not a file"):
        RunConfig.create("demmo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stagse": {}}, ("'stagse' is unknown", "nearest: stages")),
        ({"stages": {"corse": {"steps": 1}}}, ("'stages.corse' is unknown", "nearest: coarse")),
        ({"strategy": "kv_conct"}, ("'kv_conct' is unknown", "nearest: kv_concat")),
        ({"strategy": "none", "kv_concat": {"update": "direct"}}, ("'kv_concat' is unknown",)),
        ({"train": 3}, ("'train' is 3", "a mapping of its fields")),
        ({"train": {"seed": {"a": 1}}}, ("'train.seed' is {'a': 1}", "one value")),
        ({"train": {"seed": True}}, ("--train.seed", "True")),
        ({"backbone": "vit"}, ("--backbone", "vit", "dit", "unet")),
        ({"stages": {"fine": {"lr": float("nan")}}}, ("stages.fine: lr is nan; use a number in (0, 1000]",)),
    ],
)
def test_create_refuses_with_one_valueerror(settings: dict[str, Any], words: tuple[str, ...]):
    with pytest.raises(ValueError) as caught:
        RunConfig.create(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
