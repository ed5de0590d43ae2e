"""The DeepSpeed engine of a stage: its settings, optimizer, learning-rate schedule, and compiled blocks."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from dit_booth.config import PlainDict, RunConfig, StageConfig
from dit_booth.inject import Reference
from dit_booth.models.clip.encoders import Prompt
from dit_booth.models.injected import Injected, Prediction
from dit_booth.models.layers import CompiledByBlock
from dit_booth.training.distributed import Ranks, initialize
from dit_booth.training.optimizer import make_optimizer

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
"""DeepSpeed's settings that a run's configuration decides."""


class Engine(Protocol):
    """The part of DeepSpeed's engine that training uses."""

    device: torch.device

    def __call__(
        self,
        x_t: Tensor,
        timestep: Tensor,
        prompt: Prompt,
        reference: Reference | None,
        *,
        known: Tensor | None = None,
    ) -> Prediction: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> object: ...
    def get_lr(self) -> list[float]: ...
    def get_global_grad_norm(self) -> float | None: ...
    def zero_optimization_stage(self) -> int: ...
    def save_checkpoint(
        self,
        save_dir: str,
        *,
        tag: str,
        client_state: dict[str, int],
        save_latest: bool,
        exclude_frozen_parameters: bool,
    ) -> object: ...
    def load_checkpoint(
        self, load_dir: str, *, tag: str, load_module_strict: bool
    ) -> tuple[str, dict[str, int]]: ...
    def destroy(self) -> None: ...


def make_engine(
    model: Injected,
    trained: dict[str, nn.Parameter],
    config: RunConfig,
    stage: StageConfig,
    settings: PlainDict,
) -> Engine:
    """Return a DeepSpeed engine whose optimizer holds the trained parameters only."""
    optimizer = make_optimizer(trained, config.train, stage.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, stage))
    engine: Engine = initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


def learning_rate(step: int, stage: StageConfig) -> float:
    """Return the share of the peak learning rate at optimizer step `step` (from 0)."""
    warm = min(1.0, (step + 1) / max(stage.warmup, 1))
    if stage.decay == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(step / max(stage.steps, 1), 1.0)))


def engine_settings(config: RunConfig, ranks: Ranks) -> PlainDict:
    """Return ``ds_config.json`` plus what the run's configuration decides; a setting in both is an error."""
    settings = config.engine_settings()
    if clash := [key for key in OURS if key in settings]:
        raise ValueError(
            f"ds_config {config.ds_config} sets {', '.join(clash)}; the run's configuration decides that: remove it"
            " there and use --train.batch-size, --train.accumulation, --train.clip and --stages.*.lr"
        )
    train, pieces = config.train, config.train.accumulation * ranks.world
    if train.batch_size % pieces:
        raise ValueError(
            f"train.batch_size {train.batch_size} is not divisible by accumulation {train.accumulation} x"
            f" {ranks.world} ranks; use a multiple of {pieces}"
        )
    for precision in ("bf16", "fp16"):
        if settings.get(precision, {}).get("enabled") == "auto":
            settings[precision] = {**settings[precision], "enabled": ranks.device.type == "cuda"}
    return {
        **settings,
        "train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload with PyTorch's optimizer: DeepSpeed's own needs a compiler
        "steps_per_print": 10**9,
    }


def compile_backbone(backbone: nn.Module, settings: PlainDict) -> None:
    """Compile a transformer's blocks. ValueError: the U-Net, or ZeRO stage 3, whose hooks cut every graph."""
    if not isinstance(backbone, CompiledByBlock):
        raise ValueError(
            "train.compile is true, but only blocks of the DiT and of Wan are compiled; set it to false"
        )
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "train.compile is true with ZeRO stage 3, which gathers parameters in between; use stage 2"
        )
    backbone.compile_blocks()


def grad_norm(engine: Engine) -> float:
    """Return the gradient norm before clipping; NaN where DeepSpeed does not compute it (fp32 at ZeRO stage 0)."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)
