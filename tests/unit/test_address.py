"""A stage's address: what changes it, what does not, and that equal ones are one training."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit_booth import strategy as strategies
from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.data import listing
from dit_booth.training import address
from dit_booth.training.address import SCHEMA, content_of, stages_of
from dit_booth.training.stage import set_trainable

ROOT = Path(__file__).parents[2]
BASE = ["--config", str(ROOT / "experiments/configs/demo.yaml")]
BOTH = "token_replacement+kv_concat"


def addresses(*flags: str) -> dict[str, str]:
    return {stage.name: stage.address for stage in stages_of(parse([*BASE, *flags]))}


@pytest.fixture(scope="module")
def usual() -> dict[str, str]:
    return addresses()


@pytest.mark.parametrize(
    "flags",
    [
        "--out elsewhere",
        "--store elsewhere",
        "--stop-after coarse",
        "--sample.videos 3",
        "--sample.seeds 5 6",
        "--guidance.scale 3",
        "--sampler.steps 9",
        "--train.checkpoint-every 7",
        "--train.validate-every 7 --train.validate-examples 3 --train.validate-prompts 1",
        "--data.workers 2",
        "--data.triplets.dev-csv other.csv",
        "--data.triplets.stride 2",
        "--stages.joint.steps 9",
        "--unet.heads 2",
        "--wan.heads 2",
        "--clips.level 50",
        "--known.prediction 0.1",
        "--schedule coarse fine",
    ],
)
def test_what_changes_no_stage(usual: dict[str, str], flags: str) -> None:
    assert addresses(*flags.split()) == usual


@pytest.mark.parametrize(
    "flags",
    [
        "--train.seed 1",
        "--train.batch-size 16",
        "--train.accumulation 2",
        "--train.clip 0.5",
        "--train.ema 0",
        "--data.frames 4",
        "--data.seed 1",
        "--data.toyworld.describe full",
        "--backbone unet",
        "--dit.plan all",
        "--weights none",
        "--clip.pretrained none",
        "--objective.logit-mean 0.1",
        "--objective.per-frame true",
        "--stages.coarse.foreground true",
        "--stages.coarse.steps 7",
        "--stages.coarse.lr 0.1",
        "--stages.coarse.train strategy.*",
        "--stages.coarse.strategies token_replacement kv_concat",
        "--token-replacement.l1-weight 0.5",
        "--backbone wan --weights none",
    ],
)
def test_what_changes_a_stage_and_those_after_it(usual: dict[str, str], flags: str) -> None:
    changed = addresses(*flags.split())
    assert changed.keys() == usual.keys()
    assert all(changed[name] != usual[name] for name in usual)


@pytest.mark.parametrize(
    "flags",
    [
        "--kv-concat.update direct",
        "--stages.fine.lr 0.1",
        "--stages.fine.finetune-coarse True",
        f"--strategy {BOTH}+query_projection",
    ],
)
def test_what_changes_the_fine_stage_alone(usual: dict[str, str], flags: str) -> None:
    """The coarse stage is the same training: fine points share it."""
    changed = addresses(*flags.split())
    assert changed["coarse"] == usual["coarse"]
    assert changed["fine"] != usual["fine"]


def test_known_frames_count_in_the_stages_that_have_some() -> None:
    both, known = f"{BOTH}+lvdm", ("--known.prediction", "0.1")
    before, after = (addresses("--strategy", both, *flags) for flags in ((), known))
    assert before["coarse"] == after["coarse"] and before["fine"] != after["fine"]


def test_a_stage_depends_on_those_before_it() -> None:
    assert addresses("--schedule", "fine")["fine"] != addresses()["fine"]


def test_the_engines_settings_count_by_content(tmp_path: Path, usual: dict[str, str]) -> None:
    """A sweep over ZeRO stages measures each; where the file lies and how it is written does not matter."""
    settings = json.loads((ROOT / "ds_config.json").read_text())
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(dict(reversed(settings.items())), indent=9))
    assert addresses("--ds-config", str(file)) == usual
    settings["zero_optimization"]["stage"] = 1
    file.write_text(json.dumps(settings))
    assert addresses("--ds-config", str(file))["coarse"] != usual["coarse"]


PLUGIN = """
from dit_booth.strategy import Strategy, register
@register("mine")
class Mine(Strategy):
    trains = {"fine": ("strategy.mine.*",)}
"""


def test_the_content_of_plugins_counts_where_their_strategies_are_active(
    tmp_path: Path, usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    strategies.registered()
    monkeypatch.setattr(strategies, "_REGISTRY", dict(strategies._REGISTRY))
    monkeypatch.setitem(sys.modules, "dit_booth_plugin_mine", None)  # as it was, after the test
    known = strategies._REGISTRY
    files = [tmp_path / "mine.py", tmp_path / "elsewhere" / "mine.py"]
    files[1].parent.mkdir()

    def of(file: Path, text: str, *flags: str) -> dict[str, str]:
        known.pop("mine", None)
        file.write_text(text)
        return addresses("--plugin", str(file), *flags)

    assert of(files[0], PLUGIN) == usual, "a run that has no strategy of it"
    mine = ("--strategy", f"{BOTH}+mine")
    before = of(files[0], PLUGIN, *mine)
    assert before["coarse"] == usual["coarse"] and before["fine"] != usual["fine"]
    assert of(files[1], PLUGIN, *mine) == before, "wherever it lies"
    changed = of(files[0], f"{PLUGIN}    # another training\n", *mine)
    assert changed["coarse"] == before["coarse"]
    assert changed["fine"] != before["fine"]


def test_without_plugins_nothing_of_them_enters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage without plug-ins hashes no list of them."""
    hashed: list[dict[str, Any]] = []
    digest = address.digest

    def spy(value: Any, length: int = 12) -> str:
        hashed.append(value)
        return digest(value, length)

    monkeypatch.setattr(address, "digest", spy)
    addresses()
    stages = [value for value in hashed if "stage" in value]
    assert len(stages) == 2
    assert not any("plugin" in key for stage in stages for key in stage)


def test_weights_count_by_content(tmp_path: Path, usual: dict[str, str]) -> None:
    for name in ("here", "there"):
        shutil.copy(ROOT / "dit_booth/assets/dit.safetensors", tmp_path / f"{name}.safetensors")
    here, there = (tmp_path / f"{name}.safetensors" for name in ("here", "there"))
    assert content_of(here) == content_of(there)
    first = addresses("--weights", str(here))
    assert first == addresses("--weights", str(there))
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(here, folder / "weights.safetensors")
    as_run = content_of(folder)
    (folder / "launch.json").write_text("{}")
    assert content_of(folder) == as_run, "a run folder is its weights"
    there.write_bytes(there.read_bytes()[:-1] + b"\1")
    assert addresses("--weights", str(there)) != first
    with pytest.raises(ValueError, match=r"weights has 'no\.pt', which is neither a file nor a folder"):
        addresses("--weights", "no.pt")


def test_lists_of_data_count_by_content(tmp_path: Path) -> None:
    flags = ["--data.kind", "triplets", "--data.triplets.root", str(tmp_path)]
    with pytest.raises(ValueError, match=r"has no such file"):
        addresses(*flags)
    rows = [("videoid", "page_dir", "name"), ("1", "page", "a dog runs")]
    for name in ("train", "heldout"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    flags += ["--data.triplets.csv", "train.csv"]
    before = addresses(*flags)
    assert addresses(*flags, "--data.triplets.dev-csv", "heldout.csv") == before
    with (tmp_path / "train.csv").open("a", newline="") as file:
        csv.writer(file).writerow(("2", "page", "a dog sits"))
    assert addresses(*flags) != before


def data_set(folder: Path) -> list[Path]:
    """Files of two examples in VideoBooth's format, as far as planning looks at them."""
    (folder / "train.csv").write_text("videoid,page_dir,name\n1,page,a dog runs\n2,page,a dog sits\n")
    files = [
        folder / name
        for n in "12"
        for name in (f"videos/page/{n}.mp4", f"masks/{n}/mask.json", f"masks/{n}/mask_1.png")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    return files


def test_a_replaced_video_or_mask_is_another_data_set(tmp_path: Path) -> None:
    def now(root: Path) -> dict[str, str]:
        listing._files_of.cache_clear()  # as in a new process
        return addresses(
            "--data.kind", "triplets", "--data.triplets.root", str(root), "--data.triplets.csv", "train.csv"
        )

    (tmp_path / "set").mkdir()
    files = data_set(tmp_path / "set")
    seen = [now(tmp_path / "set")]
    (tmp_path / "set" / "videos" / "page" / "3.mp4").write_text("no list names it")
    assert now(tmp_path / "set") == seen[0]
    for file in files:
        file.write_text(file.read_text() + ".")
        seen.append(now(tmp_path / "set"))
    files[0].unlink()
    seen.append(now(tmp_path / "set"))
    (files[1].parent / "mask_2.png").write_text("one more")
    seen.append(now(tmp_path / "set"))
    assert len({tuple(each.items()) for each in seen}) == len(seen), "each change is told from all others"


def test_a_copy_of_a_data_set_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    data_set(tmp_path / "set")
    there = shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    files = [(root, root / "train.csv") for root in (tmp_path / "set", there)]
    assert len({listing.files_of(*each) for each in files}) == 1


def test_the_schema_counts(monkeypatch: pytest.MonkeyPatch, usual: dict[str, str]) -> None:
    monkeypatch.setattr("dit_booth.training.address.SCHEMA", SCHEMA + 1)
    assert addresses()["coarse"] != usual["coarse"]


def test_folders(tmp_path: Path) -> None:
    config = parse([*BASE, "--out", "runs/x"])
    stage = stages_of(config)[1]
    assert stage.folder(config) == Path("runs/x/checkpoints/1_fine")
    shared = parse([*BASE, "--store", "runs/stages"])
    assert stage.folder(shared) == Path(f"runs/stages/fine-{stage.address}")


# ---- equal addresses are one training ----------------------------------------------------------------------


def start(strategy: str, *flags: str) -> nn.Module:
    tiny = ["--weights", "none", "--clip.pretrained", "none", "--data.size", "12", "--data.frames", "3"]
    return build(parse([*BASE, *tiny, "--strategy", strategy, *flags])).model


def test_a_strategy_starts_alike_whatever_it_is_composed_with() -> None:
    name = "token_replacement"
    alone = start(name).state_dict()
    states = [start(s).state_dict() for s in (BOTH, f"adaln+{name}")]
    assert any(key.startswith(f"strategy.{name}.mapper") for key in alone)
    for state in states:
        assert all(torch.equal(state[key], value) for key, value in alone.items())
    other = start(name, "--train.seed", "1").state_dict()
    assert not torch.equal(other[f"strategy.{name}.mapper.mapping_0.0.weight"],
                           alone[f"strategy.{name}.mapper.mapping_0.0.weight"])  # fmt: skip


def test_inactive_strategies_are_not_trained_even_where_a_glob_names_them() -> None:
    root = start(BOTH)
    chosen = set_trainable(root, ["strategy.*", "backbone.x_embedder.*"], ("token_replacement",))
    assert {name.split(".")[1] for name in chosen} == {"token_replacement", "x_embedder"}
    assert not any(p.requires_grad for name, p in root.named_parameters() if "kv_concat" in name)
    with pytest.raises(ValueError, match=r"train glob 'strategy\.kv_concat\.\*' matches none"):
        set_trainable(root, ["strategy.kv_concat.*"], ("token_replacement",))
