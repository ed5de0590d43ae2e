"""The program itself: what it fails on, and that sizes and names of files are any."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import check
import pytest
import torch
from check import main
from files import HERE, read
from make_files import attention_file, diffusion_file, mapper_file, unet_file, write
from safetensors.torch import save_file

from dit_booth.models.unet import UNetConfig

torch.set_num_threads(1)
UNET = UNetConfig(
    channels=(12, 24, 24),
    layers_per_block=2,
    heads=3,
    norm_groups=6,
    text_dim=10,
    down_attention=(True, False, True),
    linear_projection=True,
)


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    status = main([str(folder)])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def copied(name: str, folder: Path) -> Path:
    """A copy of a committed file, to be changed."""
    for suffix in (".json", ".safetensors"):
        shutil.copy(HERE / "data" / f"{name}{suffix}", folder / f"{name}{suffix}")
    return folder / f"{name}.safetensors"


def perturb(x: torch.Tensor) -> torch.Tensor:
    """One element, of the smallest size, moved by 1e-3 (integers: by one)."""
    out = x.clone().flatten()
    out[out.abs().argmin()] += 1e-3 if x.is_floating_point() else 1
    return out.reshape(x.shape)


# ---- what it fails on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diffusion", "tune_a_video", "videobooth_attention", "videobooth_mapper"])
def test_each_output_that_is_off_by_a_thousandth_fails(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(name, tmp_path)
    _, tensors = read(path)
    save_file({k: perturb(v) if k.startswith("outputs.") else v for k, v in tensors.items()}, path)
    status, lines = run(tmp_path, capsys)
    assert status == 1
    against_file = [line for line in lines if not line["case"].endswith("dense float64")]
    assert len(against_file) > 2 and [line for line in against_file if line["ok"]] == []
    assert all(line["ok"] for line in lines if line["case"].endswith("dense float64"))


def test_only_the_perturbed_case_of_a_unet_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds three of its outputs: the cases are those that are there."""
    path = copied("videobooth_unet_l1", tmp_path)
    _, tensors = read(path)
    kept = {"outputs.a_plain_f1", "outputs.c_fine_same_noise", "outputs.e_cfg_stage1"}
    tensors = {k: v for k, v in tensors.items() if not k.startswith("outputs.") or k in kept}
    tensors["outputs.c_fine_same_noise"] = perturb(tensors["outputs.c_fine_same_noise"])
    save_file(tensors, path)
    status, lines = run(tmp_path, capsys)
    assert status == 1 and len(lines) == 9
    bad = [line["case"] for line in lines if not line["ok"]]
    assert bad == ["c_fine_same_noise", "c_fine_same_noise float64"]
    assert all(9e-4 < line["max_abs_error"] < 1.1e-3 for line in lines if not line["ok"])


def test_a_wrong_weight_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, tensors = attention_file()
    tensors["weights.self.to_v_exemplar.weight"] += 1e-2
    write(tmp_path, "a", (info, tensors))
    status, lines = run(tmp_path, capsys)
    bad = {line["case"] for line in lines if not line["ok"]}
    assert status == 1 and bad == {"fine", "fine float64", "fine_f1", "fine_f1 float64"}


def test_a_nan_and_a_wrong_shape_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info, tensors = attention_file()
    tensors["outputs.cross"][0, 0, 0] = float("nan")
    tensors["outputs.temporal"] = tensors["outputs.temporal"][:1]  # would broadcast
    write(tmp_path, "a", (info, tensors))
    status, lines = run(tmp_path, capsys)
    bad = {line["case"]: line["max_abs_error"] for line in lines if not line["ok"]}
    assert status == 1
    assert bad == {"cross": "nan", "cross float64": "nan", "temporal": "inf", "temporal float64": "inf"}


# ---- other sizes and names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: unet_file(UNET, frames=3, batch=4, size=(5, 7)), id="unet"),
        pytest.param(lambda: attention_file(heads=4, dim=20, frames=5, batch=1), id="attention"),
        pytest.param(lambda: mapper_file(), id="mapper"),
        pytest.param(lambda: diffusion_file(), id="diffusion"),
    ],
)
def test_files_of_other_sizes_and_any_name_pass(
    made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "some name", made())
    status, lines = run(tmp_path, capsys)
    assert [line for line in lines if not line["ok"]] == []
    assert status == 0 and len(lines) > 5
    outputs = [k for k in read(tmp_path / "some name.safetensors")[1] if k.startswith("outputs.")]
    assert {line["case"].split(" ")[0] for line in lines} == {k.removeprefix("outputs.") for k in outputs}


def test_a_file_of_float64_outputs_asks_float64_runs_for_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a", attention_file())
    _, lines = run(tmp_path, capsys)
    for line in lines:
        order = 1e-9 if "float64" in line["case"] else 2e-5
        assert order <= line["tolerance"] < 3 * order, "times the output's RMS where that is above one"


# ---- files that cannot be checked ----------------------------------------------------------------------------------


def test_an_unreadable_file_fails_and_the_others_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "good", attention_file())
    path = copied("tune_a_video", tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "alone.json").write_text("{}")
    write(tmp_path, "other", ({}, {"weights.x": torch.zeros(1)}))
    write(tmp_path, "stranger", ({"config": {}}, {"outputs.x": torch.zeros(1)}))
    status, lines = run(tmp_path, capsys)
    errors = {line["file"]: line["error"] for line in lines if "error" in line}
    assert status == 1
    assert set(errors) == {"tune_a_video", "alone", "other", "stranger"}
    assert "cannot be read" in errors["tune_a_video"] and "cannot be read" in errors["alone"]
    assert "unknown format: a golden file is a json object, and tensors outputs.*" in errors["other"]
    assert "unknown format; known are" in errors["stranger"] and "videobooth_unet" in errors["stranger"]
    assert any(line["file"] == "good" and line["ok"] for line in lines)


def test_weights_that_do_not_fit_are_an_error_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info, tensors = unet_file(UNET, outputs=("a_plain_f1",))
    del tensors["weights.conv_in.bias"]
    write(tmp_path, "a", (info, tensors))
    status, lines = run(tmp_path, capsys)
    assert status == 1 and len(lines) == 1
    assert "as a videobooth_unet file it cannot be run: RuntimeError" in lines[0]["error"]
    assert "conv_in.bias" in lines[0]["error"]


def test_an_output_without_a_runner_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = check.Family("", "later", lambda info, tensors: "inputs.later" in tensors)
    monkeypatch.setattr(check, "FAMILIES", (later, *check.FAMILIES))
    info, tensors = attention_file()
    tensors["outputs.more"] = torch.zeros(1)
    write(tmp_path, "a", (info, tensors))
    write(
        tmp_path,
        "later_small",
        ({}, {"outputs.x": torch.zeros(1), "inputs.later": torch.zeros(1)}),
    )
    status, lines = run(tmp_path, capsys)
    skipped = {(line["file"], line["case"]): line["skipped"] for line in lines if "skipped" in line}
    assert status == 0
    assert skipped == {
        ("a", "more"): "no runner for this output",
        ("later_small", "*"): "no runner for later files yet",
    }
    assert all(line["ok"] is None for line in lines if "skipped" in line)


def test_a_folder_without_golden_files_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        assert main([str(folder)]) == 2
        assert "holds no golden file" in capsys.readouterr().err


def test_it_runs_as_a_program_from_anywhere(tmp_path: Path) -> None:
    write(tmp_path, "a", attention_file())
    command = [sys.executable, str(HERE / "check.py"), str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    first = json.loads(ended.stdout.splitlines()[0])
    assert list(first) == ["file", "case", "max_abs_error", "tolerance", "ok"]
    assert first["file"] == "a" and first["ok"] is True
