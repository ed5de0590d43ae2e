"""Training one stage: the loop."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dit_booth.components import Components
from dit_booth.data.example import Batch
from dit_booth.training.address import Stage
from dit_booth.training.distributed import Ranks
from dit_booth.training.engine import grad_norm
from dit_booth.training.inputs import generator_of, make_inputs, with_length
from dit_booth.training.metrics_logger import MetricsLogger
from dit_booth.training.signals import Interrupted, reading, stop_signals
from dit_booth.training.state import TrainState
from dit_booth.training.validation import Probe


def train_stage(
    components: Components,
    stage: Stage,
    folder: Path,
    ranks: Ranks,
    logger: MetricsLogger | None,
    probe: Probe | None = None,
    prior: Tensor | None = None,
) -> None:
    """Train a stage, or continue it, and write ``weights.safetensors`` into `folder` at its end.

    `probe`: measures the network further in each validation. `prior`: class images of a subject stage.

    ValueError: a configuration that cannot work, or a loss that is not finite. Interrupted: SIGINT or SIGTERM.
    """
    state = TrainState.build(components, stage, folder, ranks, logger, probe, prior)
    steps, pieces, name = state.options.steps, state.train.accumulation, stage.name
    bar = tqdm(
        total=steps, initial=state.step, desc=name, unit="step", disable=not ranks.first, mininterval=1.0
    )
    with stop_signals() as stop, reading(state.loader, state.step * pieces) as batches, bar:
        while state.step < steps:
            start, lr = time.perf_counter(), state.engine.get_lr()[0]
            losses = [micro_step(state, state.step * pieces + i, next(batches)) for i in range(pieces)]
            state.step += 1
            if state.ema is not None:
                state.ema.update(state.step)
            loss, aux_loss, stopping = ranks.mean(*torch.tensor(losses).mean(0).tolist(), float(stop.is_set))
            check_finite(loss, name, state.step, folder)
            if logger:
                seconds = time.perf_counter() - start
                values = {"loss": loss, "aux_loss": aux_loss, "lr": lr, "grad_norm": grad_norm(state.engine)}
                logger.step(name, state.step, {**values, "seconds": seconds})
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
            state.validate()
            if stopping or (state.step % state.train.checkpoint_every == 0 and state.step < steps):
                state.save()
            if stopping:
                raise Interrupted(
                    f"stopped at step {state.step} of stage {name}; the same command resumes there"
                )
    state.finish()


def micro_step(state: TrainState, index: int, batch: Batch) -> tuple[float, float]:
    """Run forward and backward of micro-batch `index`; the optimizer steps at the accumulation boundary.

    Returns the loss and the auxiliary loss.
    """
    components, engine = state.components, state.engine
    draws = [generator_of(state.train.seed, state.stage.index, row) for row in state.loader.positions(index)]
    with_image, step = bool(components.model.active), index // state.train.accumulation
    options = with_length(state.options, state.train.seed, state.stage.index, step)
    inputs = make_inputs(
        components, batch.to(engine.device), options, draws, state.dtype, with_image=with_image
    )
    prediction = inputs.predict(engine)
    loss = inputs.loss(components.objective, prediction)
    engine.backward(loss + prediction.aux_loss)
    engine.step()
    return loss.item(), prediction.aux_loss.item()


def check_finite(loss: float, name: str, step: int, folder: Path) -> None:
    """Raise ValueError on every rank if the loss, an average over them, is not finite."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step} of stage {name}; the checkpoints in {folder} are untouched: lower"
            f" --stages.{name}.lr or --train.clip in a new run (--out), or mend the data and run this again to resume"
        )
