"""The program itself: what it fails on, and that sizes and names of files are any."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import check
import pytest
import torch
from check import main
from files import HERE, read
from make_files import attention_file, diffusion_file, mapper_file, unet_file, write
from make_system_files import ddim_inversion_file, elite_file, freenoise_file, text2video_file
from safetensors.torch import save_file

from dit_booth.models.unet.model import UNetConfig

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
OF_EACH_STAGE = ("a_plain", "b_coarse", "d_fine_own_noise", "e_cfg")


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    capsys.readouterr()
    status = main([str(folder)])
    return status, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def copied(name: str, folder: Path) -> Path:
    """A copy of a committed file, to be changed."""
    folder.mkdir(exist_ok=True)
    for suffix in (".json", ".safetensors"):
        shutil.copy(HERE / "data" / f"{name}{suffix}", folder / f"{name}{suffix}")
    return folder / f"{name}.safetensors"


def perturb(x: torch.Tensor) -> torch.Tensor:
    """One element, of the smallest size, moved by 1e-3 (integers: by one)."""
    out = x.clone().flatten()
    out[out.abs().argmin()] += 1e-3 if x.is_floating_point() else 1
    return out.reshape(x.shape)


# ---- what it fails on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "diffusion",
        "tune_a_video",
        "videobooth_attention",
        "videobooth_mapper",
        "elite",
        "ddim_inversion",
        "lvdm_conditioning",
        "freenoise",
    ],
)
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
        pytest.param(
            lambda: unet_file(UNET, frames=3, batch=4, size=(5, 7), outputs=OF_EACH_STAGE), id="unet"
        ),
        pytest.param(lambda: attention_file(heads=4, dim=20, frames=5, batch=1), id="attention"),
        pytest.param(lambda: mapper_file(), id="mapper"),
        pytest.param(lambda: diffusion_file(), id="diffusion"),
        pytest.param(lambda: text2video_file(), id="text2video"),
        pytest.param(
            lambda: text2video_file(side=24, strengths=((7, -3), (100, 250)), seed=1), id="text2video, far"
        ),
        pytest.param(lambda: elite_file(), id="elite"),
        pytest.param(lambda: elite_file(heads=2, grid=4, batch=1, queries=9, seed=1), id="elite of one"),
        pytest.param(lambda: freenoise_file(), id="freenoise"),
        pytest.param(
            lambda: freenoise_file(frames=13, window=5, stride=4, heads=1, batch=1, seed=1),
            id="freenoise of one",
        ),
        pytest.param(lambda: ddim_inversion_file(), id="ddim_inversion"),
        pytest.param(
            lambda: ddim_inversion_file(channels=4, frames=5, batch=2, seed=1), id="ddim_inversion of two"
        ),
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


def without_dots(info: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["weights.stray"] = torch.zeros(1)


STRANGE: dict[str, tuple[Callable[..., Any], str]] = {
    "a weight's name without a dot": (without_dots, "IndexError: list index out of range"),
    "config: null": (lambda info, tensors: info.update(config=None), "AttributeError"),
    "no config": (lambda info, tensors: info.pop("config"), "KeyError: 'config'"),
    "channels as text": (
        lambda info, tensors: info["config"].update(block_out_channels="12"),
        "ValueError: unet.channels",
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_whatever_a_file_leads_to_is_its_line_alone(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = STRANGE[what]
    info, tensors = unet_file(UNET, outputs=("a_plain_f1",))
    change(info, tensors)
    write(tmp_path, "videobooth_unet_a", (info, tensors))
    write(tmp_path, "z", attention_file())
    status, lines = run(tmp_path, capsys)
    (bad,) = [line for line in lines if not line["ok"]]
    assert status == 1 and bad["file"] == "videobooth_unet_a" and bad["ok"] is False
    assert says in bad["error"]
    assert len(lines) == 1 + 5 * 3, "the other file is checked"


def test_an_output_that_nothing_compares_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every family; and a file none of whose outputs is compared, and one of a family without a module."""
    makers = {"attention": attention_file, "mapper": mapper_file, "diffusion": diffusion_file}
    for name, make in makers.items():
        info, tensors = make()
        write(tmp_path, name, (info, {**tensors, "outputs.more": torch.zeros(1)}))
    info, tensors = unet_file(UNET, outputs=("a_plain_f1",))
    write(tmp_path, "unet", (info, {**tensors, "outputs.more": torch.zeros(1)}))
    for name in ("dit_sigma", "catvton"):
        path = copied(name, tmp_path)
        save_file({**read(path)[1], "outputs.more": torch.zeros(1)}, path)
    inputs = {k: v for k, v in attention_file()[1].items() if not k.startswith("outputs.")}
    write(tmp_path, "nothing", (attention_file()[0], {**inputs, "outputs.more": torch.zeros(1)}))
    status, lines = run(tmp_path, capsys)
    bad = {(line["file"], line["case"]): line["error"] for line in lines if line["ok"] is not True}
    files = ("attention", "mapper", "diffusion", "unet", "dit_sigma", "catvton", "nothing")
    assert status == 1
    assert set(bad) == {(name, "more") for name in files} | {("nothing", "")}
    assert "unet_cases compares no output of this name" in bad["unet", "more"]
    assert "has no output that is compared" in bad["nothing", ""]


def test_a_family_without_a_module_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = check.Family("later_cases", "later", lambda info, tensors: "inputs.later" in tensors)
    monkeypatch.setattr(check, "FAMILIES", (later, *check.FAMILIES))
    write(tmp_path, "later_small", ({}, {"outputs.x": torch.zeros(1), "inputs.later": torch.zeros(1)}))
    status, (line,) = run(tmp_path, capsys)
    assert status == 1 and line["ok"] is False
    assert "as a later file it cannot be run: ModuleNotFoundError" in line["error"]


# ---- the original's configuration ----------------------------------------------------------------------------------


def altered(folder: Path, **config: Any) -> None:
    """The committed U-Net file with other settings, two of its outputs."""
    path = copied("videobooth_unet_l1", folder)
    info, tensors = read(path)
    kept = {"outputs.a_plain_f1", "outputs.b_coarse"}
    write(
        folder,
        path.stem,
        (
            {**info, "config": {**info["config"], **config}},
            {k: v for k, v in tensors.items() if not k.startswith("outputs.") or k in kept},
        ),
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_eps", 1e-6),
        ("act_fn", "gelu"),
        ("freq_shift", 1),
        ("flip_sin_to_cos", False),
        ("upcast_attention", True),
        ("center_input_sample", True),
        ("only_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"),
    ],
)
def test_a_setting_that_this_unet_does_not_have_is_refused(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered(tmp_path, **{key: value})
    status, (line,) = run(tmp_path, capsys)
    assert status == 1 and line["ok"] is False
    assert f"ValueError: {key} is {value!r}, this U-Net has " in line["error"]


def test_settings_at_their_defaults_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {"norm_eps": 1e-5, "act_fn": "silu", "freq_shift": 0, "flip_sin_to_cos": True}
    altered(tmp_path, **defaults, upcast_attention=False, mid_block_type="UNetMidBlock3DCrossAttn")
    status, lines = run(tmp_path, capsys)
    assert status == 0 and len(lines) == 6


def test_use_first_frame_decides_what_a_frame_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it, upstream's attn1 is plain attention within each frame; of one frame, that is the same."""
    altered(tmp_path / "golden", use_first_frame=False)
    status, lines = run(tmp_path / "golden", capsys)
    bad = {line["case"]: line["max_abs_error"] for line in lines if not line["ok"]}
    assert status == 1 and set(bad) == {"b_coarse", "b_coarse float64"} and min(bad.values()) > 1e-2
    made = unet_file(replace(UNET, plan="self"), outputs=("a_plain", "b_coarse", "c_fine_same_noise"))
    assert made[0]["config"]["use_first_frame"] is False
    write(tmp_path / "made", "a", made)
    status, lines = run(tmp_path / "made", capsys)
    assert status == 0 and len(lines) == 2 * 2 * 3
    del made[0]["config"]["use_first_frame"]  # upstream's default
    write(tmp_path / "made", "a", made)
    assert run(tmp_path / "made", capsys)[0] == 0


# ---- the program ---------------------------------------------------------------------------------------------------


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
