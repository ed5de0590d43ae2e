"""Every golden file that is here, by the program: tests/golden/data, and ../shared/golden where it exists."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import io
import json
from typing import Any

import pytest
import torch
from check import main
from files import HERE, golden_files, load

torch.set_num_threads(1)
FILES = sorted(golden_files())


@functools.cache
def printed(name: str, tmp: Any) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and lines of the program on one file."""
    folder = tmp / name
    folder.mkdir()
    path = golden_files()[name]
    for suffix in (".json", ".safetensors"):
        (folder / f"{name}{suffix}").symlink_to(path.with_suffix(suffix))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = main([str(folder)])
    return status, [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("name", FILES)
def test_all_cases_are_ok(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    status, lines = printed(name, tmp_path_factory.getbasetemp())
    assert [line for line in lines if line["ok"] is False] == []
    assert status == 0 and lines
    assert all(line["file"] == name for line in lines)


@pytest.mark.parametrize("name", FILES)
def test_every_output_is_compared(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    _, lines = printed(name, tmp_path_factory.getbasetemp())
    compared = {line["case"].split(" ")[0] for line in lines if "max_abs_error" in line}
    assert compared == {k.removeprefix("outputs.") for k in load(name)[1] if k.startswith("outputs.")}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("videobooth_unet")])
def test_the_unet_is_compared_in_float32_in_float64_and_with_the_naive_one(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    _, lines = printed(name, tmp_path_factory.getbasetemp())
    by_case = {line["case"]: line for line in lines}
    for key in (k.removeprefix("outputs.") for k in load(name)[1] if k.startswith("outputs.")):
        assert by_case[key]["tolerance"] == by_case[f"{key} float64"]["tolerance"] == 2e-5
        assert by_case[f"{key} dense float64"]["tolerance"] == 1e-9


def test_the_diffusion_of_the_paper_is_among_the_cases(tmp_path_factory: pytest.TempPathFactory) -> None:
    _, lines = printed("diffusion", tmp_path_factory.getbasetemp())
    ok = {line["case"] for line in lines if line["ok"]}
    for respacing in ("1000", "250", "50", "ddim50", "10_15_20", "5"):
        assert {
            f"{respacing}.{table}" for table in ("betas", "timestep_map", "fixed_large_log_variance")
        } <= ok
    for respacing in ("1000", "250", "50"):
        steps = ("q_sample", "p_sample", "ddim_eta0.0", "ddim_eta0.5", "training_loss", "model_ts")
        assert {f"{respacing}.{step}" for step in steps} <= ok
    assert {"5.p_sample_loop", "5.ddim_sample_loop float64"} <= ok


def test_all_fourteen_replacements_equal_the_released_ones_under_compat(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    _, lines = printed("videobooth_mapper", tmp_path_factory.getbasetemp())
    compat = [line for line in lines if line["case"].endswith("compat=videobooth")]
    default = [line for line in lines if line["case"].endswith("default")]
    assert len(compat) == 14 and len(default) == 10
    assert all(line["max_abs_error"] == 0 for line in (*compat, *default))


def test_committed_files_are_the_shared_ones_and_small() -> None:
    assert sum(path.stat().st_size for path in (HERE / "data").iterdir()) < 12 * 2**20
    for path in (HERE / "data").iterdir():
        for folder in ("golden", "golden_systems"):
            if (shared := HERE.parents[2] / "shared" / folder / path.name).is_file():
                assert filecmp.cmp(path, shared, shallow=False), path.name
