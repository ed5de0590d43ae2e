"""The cost of a stage: parameters, FLOPs, seconds, memory. Written beside its weights, before them."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from dit_booth.components import Components
from dit_booth.config import PlainDict, RunConfig, StageConfig
from dit_booth.cost.flops import Flops
from dit_booth.data.example import Batch, VideoDataset, buckets_of, stack
from dit_booth.files import read_lines, write_text
from dit_booth.training.address import Stage
from dit_booth.training.distributed import Ranks
from dit_booth.training.encoded import EncodedBatch
from dit_booth.training.inputs import generator_of, make_inputs
from dit_booth.training.metrics_logger import METRICS

COST = "cost.json"


@dataclass(frozen=True)
class StageCost:
    """The cost of a stage as known before its first step."""

    trained_parameters: int
    flops_per_step: float
    ranks: Ranks

    @classmethod
    def of(
        cls,
        components: Components,
        stage: StageConfig,
        dataset: VideoDataset,
        trained: Mapping[str, nn.Parameter],
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> StageCost:
        """Count parameters and FLOPs (on the first rank only), before DeepSpeed has the network."""
        count = sum(p.numel() for p in trained.values())
        flops = 0.0
        if ranks.first:
            numbers, counts = np.unique(buckets_of(dataset), return_counts=True)
            by_bucket = [
                statistics.fmean(
                    count_flops(
                        components, replace(stage, frames=length), dataset, dtype, ranks.device, bucket
                    )
                    for length in stage.lengths
                )
                for bucket in numbers.tolist()
            ]
            flops = statistics.fmean(by_bucket, weights=counts.tolist())
        reset_peak_memory(ranks.device)
        return cls(count, flops * components.config.train.batch_size, ranks)

    def write(self, folder: Path) -> None:
        """Write ``cost.json`` of a stage whose steps are all in its ``metrics.jsonl``."""
        device = self.ranks.device
        lines = read_lines(folder / METRICS)
        seconds = [line["seconds"] for line in lines if "validation" not in line]
        cost = {
            "steps": len(seconds),
            "trained_parameters": self.trained_parameters,
            "flops_per_step": self.flops_per_step,
            "seconds": sum(seconds),
            "step_seconds": statistics.median(seconds) if seconds else 0.0,
            "validation_seconds": sum(line["seconds"] for line in lines if "validation" in line),
            "peak_memory_mib": peak_memory_mib(device),
            "ranks": self.ranks.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        }
        write_text(folder / COST, json.dumps(cost, indent=1) + "\n")


def count_flops(
    components: Components,
    stage: StageConfig,
    dataset: VideoDataset,
    dtype: torch.dtype,
    device: torch.device,
    bucket: int = 0,
) -> float:
    """Count FLOPs of forward and backward for one video of a bucket, with the parameters that are trainable now.

    They are counted on a copy if the model has another device or dtype; no gradient is left at its parameters.
    """
    probe = components
    if any(p.device != device or p.dtype != dtype for p in components.model.parameters()):
        probe = replace(components, model=copy.deepcopy(components.model).to(device, dtype))
    example = dataset[int(np.argmax(buckets_of(dataset) == bucket))]
    step = forward_backward(probe, stage, stack(dataset, [example]).to(device), dtype)
    with Flops() as counter:
        step()
    return float(counter.total)


def forward_backward(
    components: Components, stage: StageConfig, batch: Batch | EncodedBatch, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a call that computes a batch's loss and its gradients, and leaves none; its inputs are encoded already."""
    model, device = components.model, components.device
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        inputs = make_inputs(components, batch, stage, generator_of(0), dtype, with_image=bool(model.active))

    def step() -> None:
        prediction = inputs.predict(model)
        loss = inputs.loss(components.objective, prediction) + prediction.aux_loss
        torch.autograd.grad(loss, trained, allow_unused=True)

    return step


def dtype_of(settings: PlainDict) -> torch.dtype:
    """Return the dtype that DeepSpeed casts the weights to."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((t for name, t in types.items() if settings.get(name, {}).get("enabled")), torch.float32)


def write_run_cost(
    folder: Path, config: RunConfig, stages: Sequence[Stage], seconds: Mapping[str, float]
) -> None:
    """Write ``cost.json`` of a run: the sum over its stages, wherever they were trained, and its own `seconds`.

    FLOPs and seconds of a step are those of the last stage, the memory is the largest of any stage, and a parameter
    that several stages train counts once.
    """
    done = [stage for stage in stages if stage.steps]
    costs = [
        {"name": stage.name, "address": stage.address, **_read_cost(stage.folder(config))} for stage in done
    ]
    last = costs[-1] if costs else {}
    trained = {name: n for stage in done for name, n in _sizes(stage.folder(config)).items()}
    whole = {
        "trained_parameters": sum(trained.values()),
        "flops_per_step": last.get("flops_per_step", 0.0),
        "step_seconds": last.get("step_seconds", 0.0),
        "validation_seconds": sum(cost.get("validation_seconds", 0.0) for cost in costs),
        "peak_memory_mib": max((cost.get("peak_memory_mib", 0.0) for cost in costs), default=0.0),
        **seconds,
        "stages": costs,
    }
    write_text(folder / COST, json.dumps(whole, indent=1) + "\n")


def _read_cost(folder: Path) -> PlainDict:
    file = folder / COST
    cost: PlainDict = json.loads(file.read_text())
    return cost


def _sizes(folder: Path) -> dict[str, int]:
    """Return the number of elements of each parameter that a stage has trained."""
    with safe_open(folder / "weights.safetensors", "pt") as file:
        names: list[str] = file.keys()
        return {name: math.prod(file.get_slice(name).get_shape()) for name in names}


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak: it excludes earlier stages and the copy on which FLOPs are counted."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not everywhere is it permitted: then the peak is the process's
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory since `reset_peak_memory`: by PyTorch on a GPU, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
