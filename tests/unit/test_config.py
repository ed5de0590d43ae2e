"""A run's configuration: what is refused, what a run folder is called, and what makes two runs different."""

import dataclasses
import json
from pathlib import Path

import pytest

from dit_booth.config import (
    DataConfig,
    RunConfig,
    SampleConfig,
    StageConfig,
    StagesConfig,
    TrainConfig,
    decisive,
)
from dit_booth.data.toyworld.world import Toyworld


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DataConfig(kind="triplets"), ("data.root", "empty", "folder")),
        (lambda: DataConfig(frames=0), ("data.frames is 0", "1 or more")),
        (lambda: DataConfig(stride=0), ("data.stride is 0", "1 or more")),
        (lambda: DataConfig(size=4), ("data.size is 4", "8 or more")),
        (lambda: DataConfig(workers=-1), ("data.workers is -1", "0 or more")),
        (lambda: DataConfig(max_broken=-1), ("data.max_broken is -1", "0 or more")),
        (lambda: StageConfig(steps=-1), ("steps is -1", "0 or more")),
        (lambda: StageConfig(drop=1.5), ("drop is 1.5", "0 to 1")),
        (lambda: StageConfig(drop_image=-0.1), ("drop_image is -0.1", "0 to 1")),
        (
            lambda: StageConfig(drop=0.5, drop_image=0.3, drop_text=0.3),
            ("drop 0.5 + drop_image 0.3 + drop_text 0.3 is more than all rows", "lower one"),
        ),
        (lambda: StageConfig(lr=0.0), ("lr is 0.0", "positive")),
        (lambda: TrainConfig(batch_size=0), ("train.batch_size is 0", "1 or more")),
        (lambda: TrainConfig(accumulation=0), ("train.accumulation is 0", "1 or more")),
        (lambda: TrainConfig(checkpoint_every=0), ("train.checkpoint_every is 0", "1 or more")),
        (lambda: TrainConfig(ema=1.0), ("train.ema is 1.0", "exclusive")),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_field_value_and_fix(build, words):
    with pytest.raises(ValueError) as caught:
        build()
    assert all(word in str(caught.value) for word in words), str(caught.value)


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
        {"sample": SampleConfig(seed=1)},
        {"data": DataConfig(frames=7)},
        {"strategy": "none"},
        {"ds_config": "zero3.json"},
        {"strategy_weights": ("mapper.pt",)},
    ],
)
def test_every_setting_that_changes_the_result_changes_the_folder(change):
    assert RunConfig(**change).fingerprint() != RunConfig().fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"out": "x"}, {"data": DataConfig(workers=2)}, {"train": TrainConfig(checkpoint_every=5)}],
)
def test_what_only_watches_the_run_does_not(change):
    other = RunConfig(**change)
    assert other.fingerprint() == RunConfig().fingerprint()
    assert decisive(other.as_dict()) == decisive(RunConfig().as_dict())


def test_a_run_from_before_strategy_weights_is_the_same_run():
    before = RunConfig().as_dict()
    del before["strategy_weights"]
    assert decisive(before) == decisive(RunConfig().as_dict())
    assert decisive(before) != decisive(RunConfig(strategy_weights=("mapper.pt",)).as_dict())


def test_decisive_leaves_its_argument_alone():
    settings = RunConfig().as_dict()
    before = json.dumps(settings)
    decisive(settings)
    assert json.dumps(settings) == before


def test_training_and_sampling_read_different_toy_worlds():
    config = DataConfig(frames=2, size=12, image_size=16)
    train, heldout = config.build(heldout=False), config.build(heldout=True)
    assert isinstance(train, Toyworld)
    assert train[0].video.shape == (2, 3, 12, 12)
    assert train[0].image.shape == (3, 16, 16)
    assert train[0].key != heldout[0].key


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path):
    missing = str(tmp_path / "none")
    with pytest.raises(ValueError, match=r"data\.model is .*none.*no folder"):
        DataConfig(kind="triplets", root=missing).build(heldout=False)
