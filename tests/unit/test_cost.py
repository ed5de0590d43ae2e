"""A stage's peak memory: what earlier stages have held is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_booth.training.cost import peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


def test_the_peak_begins_anew() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    reset_peak_memory(CPU)  # what other tests of this process have held is forgotten, too
    start = peak_memory_mib(CPU)
    large = torch.ones(64, 2**20)  # 256 MiB
    high = peak_memory_mib(CPU)
    assert high > start + 200
    del large
    assert peak_memory_mib(CPU) > high - 50  # what is freed stays in the peak; the kernel counts in batches
    reset_peak_memory(CPU)
    low = peak_memory_mib(CPU)
    assert low < high - 200
    middle = torch.ones(32, 2**20)  # 128 MiB
    assert low + 100 < peak_memory_mib(CPU) < high - 100, middle.shape
