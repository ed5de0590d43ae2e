"""docs/write_a_strategy.md does what it says; plug-ins come in by a file and by an entry point, broken ones by name."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dit_booth import strategy as registry
from dit_booth.config.parse import load_plugin
from dit_booth.inject import Needs
from dit_booth.strategy import find, registered
from dit_booth.testing import PROMISES, check_strategy, promises

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/write_a_strategy.md").read_text(), flags=re.DOTALL)
STRATEGY, OPTIONS, CHECK = BLOCKS
torch.set_num_threads(1)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The document's code in a file; what it registers is forgotten after the test."""
    registered()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    file = tmp_path / "one_token.py"
    file.write_text(STRATEGY + OPTIONS)
    return file


def test_the_strategy_takes_fewer_than_thirty_lines() -> None:
    assert len([line for line in STRATEGY.splitlines() if line.strip()]) < 30
    assert len(STRATEGY.splitlines()) <= 32, "blank lines and all"


def test_the_document_names_every_declaration() -> None:
    text = (ROOT / "docs/write_a_strategy.md").read_text()
    declared = [name for name in registry.Strategy.__annotations__ if name not in ("name", "Config")]
    needed = [field.name for field in fields(Needs)]
    assert all(f"`{name}`" in text for name in (*declared, *needed)), (declared, needed)


def test_with_an_option_it_keeps_all_promises(plugin: Path) -> None:
    load_plugin(str(plugin))
    check_strategy(
        "one_token_at",
        backbones=["dit-factorised", "unet"],
        promises=[promise for promise in PROMISES if promise is not promises.compiled_is_the_same],
    )


@pytest.mark.slow
def test_the_documents_check_runs(plugin: Path) -> None:
    load_plugin(str(plugin))
    exec(CHECK, {})  # all promises of the one without options; compiled, too


def test_it_trains_and_samples(plugin: Path, tiny: list[str], in_process: Any, tmp_path: Path) -> None:
    ended = in_process(
        *tiny, "--plugin", str(plugin), "--strategy", "one_token", "--stages.fine.train", "*",
        "--sample.videos", "1", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert ended.code == 0, ended.output
    trained = load_file(tmp_path / "run" / "strategy.safetensors")
    assert "one_token.taps.blocks.4.attn1.to_v.weight" in trained
    assert (tmp_path / "run" / "samples" / "000-seed0.mp4").is_file()


def test_its_options_are_in_the_help(plugin: Path, program: Any) -> None:
    said = program.run("--plugin", str(plugin), "--strategy", "one_token_at", "--help")
    assert said.code == 0, said.output
    assert "--one-token-at.where" in said.output
    assert "attentions that read the image" in said.output.replace("│", "")


def test_the_list_shows_it(plugin: Path, program: Any) -> None:
    said = program.python("dit_booth", "strategies", "--plugin", str(plugin))
    assert said.code == 0, said.output
    entry = said.output[said.output.index("one_token:") :].split("\n    ")
    assert entry[0] == "one_token: Every frame also reads CLIP's image embedding, as one token."
    assert "ports: qkv" in entry and "stages: fine" in entry and "identity at initialisation: no" in entry


# ---- entry points ------------------------------------------------------------------------------------------


def install(folder: Path, name: str, code: str) -> None:
    """A package as pip would leave it: a module and its metadata."""
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[dit_booth.strategies]\n{name}_entry = {name}\n")


def test_an_installed_plug_in_is_there_and_a_broken_one_is_named(tmp_path: Path, program: Any) -> None:
    install(tmp_path, "good_lab", STRATEGY)
    install(tmp_path, "bad_lab", "import nowhere_to_be_found\n")
    said = program.python("experiments/run.py", "--strategy", "one_tokn", packages=tmp_path)
    assert said.code == 1
    last = said.output.strip().splitlines()[-1]
    assert last.startswith("error: strategy 'one_tokn' is unknown; nearest: one_token")
    assert last.endswith(
        "plug-in bad_lab_entry (bad_lab) failed to import: ModuleNotFoundError: No module named"
        " 'nowhere_to_be_found'"
    )
    listed = program.python("dit_booth", "strategies", packages=tmp_path)
    assert listed.code == 0
    assert "one_token: Every frame" in listed.output
    assert "plug-in bad_lab_entry failed to import" in listed.output.replace(" (bad_lab)", "")
    other = program.python("experiments/run.py", "--strategy", "one_token", "--help", packages=tmp_path)
    assert other.code == 0, "a broken plug-in breaks nothing else"


def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, program: Any) -> None:
    (tmp_path / "mine.py").write_text("raise RuntimeError('half done')\n")
    for command in (("experiments/run.py",), ("dit_booth", "strategies")):
        said = program.python(*command, "--plugin", str(tmp_path / "mine.py"))
        assert said.code == 1
        expected = f"error: --plugin {tmp_path}/mine.py failed: RuntimeError: half done"
        assert expected in said.output.splitlines()[-1]


# ---- the list ----------------------------------------------------------------------------------------------


def test_the_list_has_every_strategy_with_the_papers_counts(program: Any) -> None:
    said = program.python("dit_booth", "strategies")
    assert said.code == 0, said.output
    entries = {entry.split(":")[0]: entry for entry in re.split(r"\n(?=\S)", said.output)}
    assert set(registered()) | {"elite", "videobooth"} == set(entries)
    for name, cls in find("token_replacement+kv_concat").items():
        assert (cls.__doc__ or "").splitlines()[0] in entries[name]
    assert "unet-sd 49.6" in entries["spatial_concat"], "CatVTON: 49.57 M of the U-Net (Table 2)"
    assert "unet-sd 21.5" in entries["decoupled_attention"], "IP-Adapter: 22 M"
    assert "dit-nano 0, dit-s 0" in entries["none"]
    assert "ports: prompt, modulation, qkv" in entries["token_replacement"]
    assert "not together with: kv_concat, spatial_concat" in entries["in_context"]
    assert "ports: residual\n" in entries["vace"] and "of several images: all" in entries["vace"]
    assert "of several images: the first" in entries["kv_concat"] and "images: none" in entries["none"]
