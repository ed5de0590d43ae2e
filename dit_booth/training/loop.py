"""Training one stage on a DeepSpeed engine: the loop, and what makes it stop and resume cleanly."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dit_booth.components import Components
from dit_booth.config import RunConfig, StageConfig
from dit_booth.data.example import Batch, Loader
from dit_booth.files import given_or_packaged
from dit_booth.models.dit.model import VideoDiT
from dit_booth.models.weights import write
from dit_booth.training import checkpoint
from dit_booth.training.address import Stage
from dit_booth.training.distributed import Ranks, initialize
from dit_booth.training.ema import Ema
from dit_booth.training.inputs import generator_of, make_inputs
from dit_booth.training.metrics_logger import MetricsLogger
from dit_booth.training.optimizer import make_optimizer
from dit_booth.training.stage import set_trainable, stage_config, trainable_globs
from dit_booth.training.stage_cost import Cost, dtype_of

log = logging.getLogger(__name__)

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The user stopped the run; a checkpoint of this moment is written."""


def train_stage(
    components: Components, of: Stage, folder: Path, ranks: Ranks, journal: MetricsLogger | None, begin: float
) -> None:
    """Train a stage, or continue it, and write ``weights.safetensors`` into `folder` at its end.

    ValueError: a configuration that cannot work, or a loss that is not finite. Interrupted: SIGINT or SIGTERM.
    """
    config, name, index, active = components.config, of.name, of.index, of.active
    stage, components.model.active = stage_config(config, name), active
    parameters = set_trainable(
        components.model, trainable_globs(config, components.model, name, active), active
    )
    dataset = components.dataset(heldout=False)
    cost = Cost.of(components, stage, dataset, parameters, ranks, dtype_of(engine_settings(config, ranks)))
    if config.train.compile:
        compile_backbone(components.model.backbone, engine_settings(config, ranks))
    engine = make_engine(components, parameters, stage, ranks)
    dtype = next(iter(parameters.values())).dtype
    averaged = config.train.ema or config.train.ema_width
    ema = Ema(parameters, config.train.ema, config.train.ema_width) if averaged else None
    done = checkpoint.load(folder, engine, ema, ranks)
    if done:
        log.info("stage %s goes on after step %d", name, done)
    if journal:
        journal.begin(name, folder, done)
    micro = config.train.batch_size // (config.train.accumulation * ranks.world)
    loader = Loader(
        dataset,
        batch_size=micro,
        seed=config.train.seed + index,
        rank=ranks.rank,
        world_size=ranks.world,
        workers=config.data.workers,
    )
    bar = tqdm(
        total=stage.steps, initial=done, desc=name, unit="step", disable=not ranks.first, mininterval=1.0
    )
    with stop_signals() as stop, reading(loader, done * config.train.accumulation) as batches, bar:
        for step in range(done + 1, stage.steps + 1):
            start = time.perf_counter()
            losses, lr = [], engine.get_lr()[0]
            for part in range(config.train.accumulation):
                rows = loader.positions((step - 1) * config.train.accumulation + part)
                draws = [generator_of(config.train.seed, index, row) for row in rows]
                losses.append(micro_step(components, engine, next(batches), stage, draws, dtype))
            if ema is not None:
                ema.update(step)
            loss, aux_loss, stopping = ranks.mean(*torch.tensor(losses).mean(0).tolist(), float(stop.is_set))
            check_finite(loss, name, step, folder)
            if journal:
                seconds = time.perf_counter() - start
                values = {"loss": loss, "aux_loss": aux_loss, "lr": lr, "grad_norm": grad_norm(engine)}
                journal.step(name, step, {**values, "seconds": seconds})
                if step == done + 1:
                    log.info("first step of %s after %.1f s", name, time.perf_counter() - begin)
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
            if stopping or (step % config.train.checkpoint_every == 0 and step < stage.steps):
                checkpoint.save(folder, engine, ema, ranks, step)
            if stopping:
                raise Interrupted(f"stopped at step {step} of stage {name}; the same command resumes there")
    if ranks.first:
        cost.write(folder)
    finish(components, parameters, ema, folder, ranks, name)
    engine.destroy()


def micro_step(
    components: Components,
    engine: Any,
    batch: Batch,
    stage: StageConfig,
    draws: Sequence[torch.Generator],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Forward and backward of one micro-batch; the optimizer steps at the accumulation boundary."""
    batch = batch.to(engine.device)
    inputs = make_inputs(components, batch, stage, draws, dtype, with_image=bool(components.model.active))
    prediction = engine(inputs.x_t, inputs.timestep, inputs.prompt, inputs.reference)
    loss = inputs.loss(components.objective, prediction)
    engine.backward(loss + prediction.aux_loss)
    engine.step()
    return loss.item(), prediction.aux_loss.item()


def compile_backbone(backbone: torch.nn.Module, settings: dict[str, Any]) -> None:
    """Compile the DiT's blocks. ValueError: another backbone, or ZeRO stage 3, whose hooks cut every graph."""
    if not isinstance(backbone, VideoDiT):
        raise ValueError("train.compile is true, but only the DiT's blocks are compiled; set it to false")
    if settings.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "train.compile is true with ZeRO stage 3, which gathers parameters in between; use stage 2"
        )
    backbone.compile_blocks()


def make_engine(
    components: Components, trained: dict[str, torch.nn.Parameter], stage: StageConfig, ranks: Ranks
) -> Any:
    """A DeepSpeed engine whose optimizer holds the trained parameters only."""
    optimizer = make_optimizer(trained, components.config.train, stage.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, stage))
    return initialize(
        model=components.model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=engine_settings(components.config, ranks),
    )


def learning_rate(step: int, stage: StageConfig) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0)."""
    warm = min(1.0, (step + 1) / max(stage.warmup, 1))
    if stage.decay == "constant":
        return warm
    return warm * 0.5 * (1 + math.cos(math.pi * min(step / max(stage.steps, 1), 1.0)))


def engine_settings(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """``ds_config.json`` plus what the run's configuration decides; a setting in both is an error."""
    file = given_or_packaged(config.ds_config, "configs")
    if not file.is_file():
        raise ValueError(
            f"ds_config is {config.ds_config!r}, which is not a file; give DeepSpeed's JSON settings"
        )
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"ds_config {file} is not JSON: {error}") from error
    if clash := [key for key in OURS if key in settings]:
        raise ValueError(
            f"ds_config {file} sets {', '.join(clash)}; the run's configuration decides that: remove it there and use"
            " --train.batch-size, --train.accumulation, --train.clip and --stages.*.lr"
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


def check_finite(loss: float, name: str, step: int, folder: Path) -> None:
    """The same on every rank: the loss is already averaged."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step} of stage {name}; the checkpoints in {folder} are untouched: lower"
            f" --stages.{name}.lr or --train.clip in a new run (--out), or mend the data and run this again to resume"
        )


def grad_norm(engine: Any) -> float:
    """The norm before clipping; NaN where DeepSpeed does not tell it (fp32 at ZeRO stage 0)."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def finish(
    components: Components,
    parameters: dict[str, torch.nn.Parameter],
    ema: Ema | None,
    folder: Path,
    ranks: Ranks,
    name: str,
) -> None:
    """Write what the stage trained (its averages); the file appears last and whole: it marks the stage as finished."""
    import deepspeed

    if ema is not None:
        ema.copy_to_parameters()
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        if ranks.first:
            state = {key: p.detach().float() for key, p in parameters.items()}
            write(
                folder / "weights.safetensors", state, {"stage": name, "strategy": components.config.strategy}
            )
    ranks.barrier()


@contextlib.contextmanager
def reading(loader: Loader, start: int) -> Iterator[Iterator[Batch]]:
    """The batches from number `start`. Ctrl-C and the launcher's SIGTERM pass the reader processes by.

    They reach the whole process group, and the step that they meet still needs its batches. As the readers do not
    hear SIGTERM, they are told to end here (a private name of PyTorch's: without it they end with their iterator).
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # inherited by the readers, which start now
    try:
        batches = loader.stream(start)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()


class StopFlag:
    """Set by SIGINT or SIGTERM."""

    is_set = False


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads after its step (the launcher sends both on Ctrl-C)."""
    flag = StopFlag()

    def stop(number: int, frame: Any) -> None:
        flag.is_set = True

    old = {number: signal.signal(number, stop) for number in STOPPING}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
