"""Freed memory is kept: a process that frees and asks again meets no page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from dit_booth.training.heap import keep_freed_memory
from experiments.bench import page_faults

ROUNDS = """
import resource, sys
import numpy as np
from dit_booth.training.heap import keep_freed_memory
if sys.argv[1] == "kept":
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


def test_the_bench_measures_both_in_processes_of_their_own() -> None:
    options = page_faults.Options(latents=4, batch=1, steps=1, rounds=1)
    row = page_faults.measure(options, "none")
    assert all(row[f"seconds_{kind}"] > 0 for kind in ("default", "kept")) and row["faults_default"] > 0
    assert row["over_default"] == pytest.approx(row["seconds_kept"] / row["seconds_default"])
    text = page_faults.page([row], "COMMAND")
    assert "| nano | 4 x 4 | 1 | none |" in text and "COMMAND" in text
