"""How the network is split over ranks is a matter of memory and speed: the result is the same within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCRIPT = "tests/cli/zero_steps.py"
# What stages 1 and 2 split (gradients and the optimizer's state) is one flat tensor, whatever network it comes from.
RUNS = ("dit-1", "dit-2", "dit-2o", "dit-3", "unet-3")
TOLERANCE = 1e-5  # ten steps move a parameter by up to 1e-3


@pytest.fixture(scope="module")
def trained(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps on a frozen base: one process without ZeRO, and the same two ranks at each stage."""
    out = ["--out", str(tmp_path_factory.mktemp("zero"))]
    alone = program.python(SCRIPT, "--runs", "dit-0", "unet-0", *out)
    for ended in (alone, *program.two_ranks("--runs", *RUNS, *out, program=SCRIPT)):
        assert ended.code == 0, ended.output
    return Path(out[-1])


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_at_every_zero_stage_equal_one_process(trained: Path, run: str) -> None:
    backbone, zero = run.split("-")
    one, two = (
        load_file(trained / f"{backbone}-{name}" / "weights.safetensors")
        for name in ("1-zero0", f"2-zero{zero}")
    )
    assert list(one) == list(two)
    assert all(name.startswith("strategy.kv_concat.") for name in one), "the base is frozen"
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert apart <= TOLERANCE, apart


@pytest.mark.parametrize("backbone", ["dit", "unet"])
def test_ten_steps_do_move_the_parameters(trained: Path, backbone: str) -> None:
    """The control: to_k_new starts as the backbone's own to_k."""
    ended = load_file(trained / f"{backbone}-1-zero0" / "weights.safetensors")
    start = load_file(ROOT / "dit_booth" / "assets" / f"{backbone}.safetensors")
    name = next(name for name in ended if name.endswith("attn1.to_k_new.weight"))
    own = name.removeprefix("strategy.kv_concat.taps.").replace("to_k_new", "to_k")
    moved = (ended[name] - start[f"backbone.{own}"].float()).abs()
    assert float(torch.median(moved)) > 10 * TOLERANCE


def test_no_engine_loads_inductor(trained: Path) -> None:
    """Seconds of every rank's start, if DeepSpeed's Muon were imported as it is."""
    loaded = [set(file.read_text().split()) for file in trained.glob("modules-*")]
    assert len(loaded) == 3
    assert all("deepspeed.runtime.zero.muon.original_muon" in modules for modules in loaded)
    assert not any("torch._inductor.compile_fx" in modules for modules in loaded)
