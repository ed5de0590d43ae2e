"""A stage's peak memory: what earlier stages have held is forgotten. Its FLOPs: attention counts in every kernel."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.training.stage import set_trainable
from dit_booth.training.stage_cost import count_flops, peak_memory_mib, reset_peak_memory

CPU = torch.device("cpu")


def pages(mib: int) -> mmap.mmap:
    """Written memory straight from the system: malloc would hand out again what other tests of this process freed."""
    held = mmap.mmap(-1, mib << 20)
    for _ in range(mib):
        held.write(bytes(1 << 20))
    return held


def test_the_peak_begins_anew() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let a process reset its peak")
    reset_peak_memory(CPU)  # what other tests of this process have held is forgotten, too
    start = peak_memory_mib(CPU)
    large = pages(256)
    high = peak_memory_mib(CPU)
    assert high > start + 200
    large.close()
    assert peak_memory_mib(CPU) > high - 50  # what is freed stays in the peak; the kernel counts in batches
    reset_peak_memory(CPU)
    low = peak_memory_mib(CPU)
    assert low < high - 200
    middle = pages(128)
    assert low + 100 < peak_memory_mib(CPU) < high - 100, len(middle)


def step_flops(kernel: str) -> float:
    """Of a step that trains the whole DiT, with an attention kernel."""
    base = str(Path(__file__).parents[2] / "experiments/configs/toyworld_base.yaml")
    config = parse(["--config", base, "--weights", "none", "--schedule", "base", "--dit.attention", kernel])
    components = build(config)
    components.model.active = ()
    set_trainable(components.model, ["backbone.*"])
    return count_flops(components, config.stages.base, config.data.build(), torch.float32, CPU)


def test_attention_counts_the_same_in_flash_as_in_matrix_products() -> None:
    """PyTorch's own counter does not know the CPU's flash kernel."""
    assert step_flops("torch_flash") == step_flops("math")
