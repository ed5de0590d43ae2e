"""A whole training step as one CUDA graph: launched at once, however many kernels it has."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3
"""Steps before the capture: they make gradients, averages, tables of positions and kernels' plans."""


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a replay of `step`'s CUDA graph, for repeated calls; on the CPU `step` itself.

    The step must not read a value back from the device, and what changes between its calls must lie in tensors that it
    reads in place (a learning rate, a batch). It runs `WARM_UP` times before the capture, and not during it. What it
    returns is that of the capture: the same tensors, overwritten by each replay.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> object:
        graph.replay()
        return result

    return replay
