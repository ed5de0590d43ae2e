"""The state of a stage in training: set up from a configuration, saved, continued and finished."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_booth.components import Components
from dit_booth.config import StageConfig, TrainConfig
from dit_booth.data.example import Loader
from dit_booth.models.weights import write
from dit_booth.training import checkpoint
from dit_booth.training.address import Stage
from dit_booth.training.distributed import Ranks
from dit_booth.training.ema import Ema
from dit_booth.training.encoded import EncodedData
from dit_booth.training.engine import Engine, compile_backbone, engine_settings, make_engine
from dit_booth.training.metrics_logger import MetricsLogger
from dit_booth.training.stage import set_trainable, stage_config, trainable_globs
from dit_booth.training.stage_cost import StageCost, dtype_of
from dit_booth.training.validation import Probe, Validation

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """All that one stage trains with; `step` counts the optimizer steps done. `logger` is on the first rank only."""

    components: Components
    stage: Stage
    options: StageConfig
    folder: Path
    ranks: Ranks
    parameters: dict[str, nn.Parameter]
    dtype: torch.dtype
    engine: Engine
    ema: Ema | None
    loader: Loader
    cost: StageCost
    validation: Validation | None
    logger: MetricsLogger | None
    step: int

    @classmethod
    def build(
        cls,
        components: Components,
        stage: Stage,
        folder: Path,
        ranks: Ranks,
        logger: MetricsLogger | None,
        probe: Probe | None = None,
        prior: Tensor | None = None,
    ) -> TrainState:
        """Set a stage up on the device, and load its latest checkpoint. ValueError: it cannot work as configured."""
        config, model = components.config, components.model
        options, model.active = stage_config(config, stage.name), stage.active
        globs = trainable_globs(config, model, stage.name, stage.active)
        parameters = set_trainable(model, globs, stage.active)
        cached = bool(config.data.cache) and stage.name != "subject"
        dataset: Any = EncodedData(config) if cached else components.stage_data(stage.name, prior)
        settings = engine_settings(config, ranks)
        cost = StageCost.of(components, options, dataset, parameters, ranks, dtype_of(settings))
        if config.train.compile:
            compile_backbone(model.backbone, settings)
        engine = make_engine(model, parameters, config, options, settings)
        dtype = next(iter(parameters.values())).dtype
        ema = make_ema(parameters, config.train)
        step = checkpoint.load(folder, engine, ema, ranks)
        if step:
            log.info("stage %s goes on after step %d", stage.name, step)
        if logger:
            logger.begin(stage.name, folder, step)
        loader = Loader(
            dataset,
            batch_size=config.train.batch_size // (config.train.accumulation * ranks.world),
            seed=config.train.seed + stage.index,
            rank=ranks.rank,
            world_size=ranks.world,
            workers=config.data.workers,
        )
        validation = Validation.build(components, options, ranks, dtype, loader.batch_size, probe)
        return cls(
            components,
            stage,
            options,
            folder,
            ranks,
            parameters,
            dtype,
            engine,
            ema,
            loader,
            cost,
            validation,
            logger,
            step,
        )

    @property
    def train(self) -> TrainConfig:
        return self.components.config.train

    def validate(self) -> None:
        """Measure the network on held-out examples and log it, if the step is one to do so at."""
        if self.validation is None or self.step % self.train.validate_every:
            return
        start = time.perf_counter()
        values = self.validation.measure(self.ema)
        if self.logger:
            self.logger.validation(self.stage.name, self.step, values, time.perf_counter() - start)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        checkpoint.save(self.folder, self.engine, self.ema, self.ranks, self.step)

    def finish(self) -> None:
        """Write the trained (averaged) weights; the file appears last and whole: it marks the stage as finished."""
        import deepspeed

        if self.ranks.first:
            self.cost.write(self.folder)
        if self.ema is not None:
            self.ema.copy_to_parameters()
        with deepspeed.zero.GatheredParameters(list(self.parameters.values())):
            if self.ranks.first:
                weights = {name: p.detach().float() for name, p in self.parameters.items()}
                about = {"stage": self.stage.name, "strategy": self.components.config.strategy}
                write(self.folder / "weights.safetensors", weights, about)
        self.ranks.barrier()
        self.engine.destroy()


def make_ema(parameters: dict[str, nn.Parameter], train: TrainConfig) -> Ema | None:
    """Return the average that a stage ends with; None where none is configured."""
    return Ema(parameters, train.ema, train.ema_width) if train.ema or train.ema_width else None
