"""The training-step bench: it trains what it says, counts what is computed, and writes its rows."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from experiments.bench import train_step as bench
from experiments.bench.measure import keep_freed_memory

TINY = bench.TrainStepArguments(
    sizes=("nano",), frames=(2,), strategies=("none", "adaln"), latents=((4, 8, 8),), rounds=1
)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return bench.run(TINY)


def test_a_row_for_every_case(rows: list[dict]) -> None:
    assert [row["strategy"] for row in rows] == ["none", "adaln"]
    for row in rows:
        assert row["seconds"] > 0 and row["utilisation"] > 0 and row["peak_memory_mib"] > 0
        assert row["flops"] == bench.model_flops(
            bench.StepCase("nano", 2, "first+previous", row["strategy"], (4, 8, 8)), TINY
        )
        assert row["tokens"] == 16
        assert not row["graph"] and not row["compiled"]
    assert rows[1]["parameters"] > rows[0]["parameters"]
    page = bench.page(rows, "COMMAND")
    assert page.count("| nano/2 |") == 2 and "COMMAND" in page


def test_flops_grow_with_the_frames() -> None:
    two, four = (
        bench.model_flops(bench.StepCase("nano", f, "first", "none", (4, 8, 8)), replace(TINY, frames=(f,)))
        for f in (2, 4)
    )
    assert 1.9 < four / two < 2.2


def test_a_step_moves_every_weight_that_has_a_gradient() -> None:
    case = bench.cases_of(TINY)[0]
    torch.manual_seed(0)
    root = bench.build(case.config(TINY), case.latents, "cpu").to(torch.bfloat16)
    for p in root.parameters():
        torch.nn.init.normal_(p, std=0.1)
    trainer = bench.StepTrainer(root)
    before = [m.clone() for m in trainer.masters]
    trainer.step(bench.batch_of(root, case, 1, "cpu", torch.bfloat16))
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.masters, strict=True)]
    assert all(m.dtype == torch.float32 for m in trainer.masters) and sum(moved) > 0.9 * len(moved)
    for p, master in zip(trainer.parameters, trainer.masters, strict=True):
        assert torch.equal(p, master.to(p.dtype))


def test_a_case_for_every_size_of_latents() -> None:
    """In context, a video of fewer tokens a frame pays less for its reference: attention is less of its work."""
    options = replace(TINY, latents=((4, 8, 8), (4, 16, 16)), strategies=("none", "in_context"))
    cases = bench.cases_of(options)
    assert [case.latents[1] for case in cases] == [8, 8, 16, 16]
    small, small_more, large, large_more = (bench.model_flops(case, options) for case in cases)
    assert 1 < small_more / small < large_more / large


ROUNDS = """
import resource, sys
import numpy as np
if sys.argv[1] == "kept":
    from experiments.bench.measure import keep_freed_memory
    keep_freed_memory()
for round in range(4):
    if round == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(6 << 20, dtype=np.float32) for _ in range(4)]  # 24 MiB each
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
def test_what_is_freed_is_there_again() -> None:
    default, kept = (
        int(subprocess.run([sys.executable, "-c", ROUNDS, kind], check=True, capture_output=True).stdout)
        for kind in ("default", "kept")
    )
    assert kept < 100 < default // 10, "two rounds of four blocks of 6,144 pages"


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    keep_freed_memory()
