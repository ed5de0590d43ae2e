"""A stage's peak memory: what earlier stages have held is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_booth.training.cost import peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


def test_the_peak_begins_anew() -> None:
    large = torch.ones(64, 2**20)  # 256 MiB
    before = peak_memory_mib(CPU)
    del large
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    reset_peak_memory(CPU)
    assert peak_memory_mib(CPU) < before - 200
    middle = torch.ones(32, 2**20)
    assert peak_memory_mib(CPU) > before - 200, middle.shape
