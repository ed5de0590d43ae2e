"""The configurations of the compared systems: each is a run of its own name, on both backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dit_booth.config import RunConfig
from dit_booth.config.parse import parse
from dit_booth.cost.describe import build
from dit_booth.files import packaged
from dit_booth.training.stage import active_strategies, schedule_of, set_trainable, trainable_globs

NAMES = sorted(file.stem for file in packaged("baselines").glob("*.yaml"))
SYSTEMS = {
    *("videobooth", "textual_inversion", "dreambooth", "dreambooth_lora", "dreambooth_no_prior"),
    *("tune_a_video", "catvton", "ip_adapter", "phantom", "stand_in", "none", "elite", "text2video_zero"),
    *("lvdm", "dit_image", "skyreels", "magref", "vace"),
}


def test_every_system_has_a_configuration():
    assert set(NAMES) >= SYSTEMS


@pytest.mark.parametrize("backbone", ["dit", "unet"])
@pytest.mark.parametrize("name", NAMES)
def test_a_systems_stages_train_parameters_that_its_backbone_has(name: str, backbone: str):
    config = RunConfig.create(name, backbone=backbone)
    model = build(config, (12, 16, 16))
    schedule = schedule_of(config)
    assert schedule or name in ("none", "text2video_zero", "dit_image")
    for index, stage in enumerate(schedule):
        active = active_strategies(config, schedule, index)
        trained = set_trainable(model, trainable_globs(config, model, stage, active), active)
        if name == "tune_a_video":
            kinds = {".".join(parameter.split(".")[-3:-1]) for parameter in trained}
            queries = {"attn1.to_q"} | ({"attn2.to_q"} if backbone == "unet" else set())
            assert queries <= kinds
            assert all("attn_temp" in parameter or "to_q" in parameter for parameter in trained)
        if name.startswith("dreambooth") and name != "dreambooth_lora":
            assert len(trained) == len(list(model.backbone.parameters()))


def test_a_system_runs_by_its_name(tmp_path: Path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "star.png")
    arguments = ["--config", "dreambooth_no_prior", "--subject.image", "star.png", "--subject.word", "star"]
    config = parse(arguments)
    assert (config.subject.token, config.subject.prior, config.schedule) == ("sks", 0, ("subject",))


def test_an_unknown_name_gets_the_nearest_system():
    with pytest.raises(ValueError, match=r"dreambooht is not a file; nearest: dreambooth\.yaml"):
        parse(["--config", "dreambooht"])
