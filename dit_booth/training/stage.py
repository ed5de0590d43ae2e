"""What a stage trains: the active strategies, and the trainable parameters by glob."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from dit_booth.config import STAGES, RunConfig, StageConfig, StageName
from dit_booth.inject import suggest
from dit_booth.injected import Injected

log = logging.getLogger(__name__)


def schedule_of(config: RunConfig, root: Injected) -> tuple[StageName, ...]:
    """The stages of a run, in order: as configured, or coarse and fine as far as a strategy trains in them."""
    if config.schedule:
        return config.schedule
    trained = {stage for name in root.strategy.names for stage in root.strategy.part(name).trains}
    return tuple(stage for stage in STAGES if stage in trained and stage in ("coarse", "fine"))


def active_strategies(
    config: RunConfig, root: Injected, schedule: Sequence[StageName], index: int
) -> tuple[str, ...]:
    """The strategies that take part in a stage: as configured, or those that this stage or an earlier one trains."""
    stage = stage_config(config, schedule[index])
    for name in stage.strategies:
        if name not in root.strategy.names:
            raise ValueError(
                f"stages.{schedule[index]}.strategies names {name!r}, which is not in strategy {config.strategy!r};"
                " add it with +"
            )
    if stage.strategies:
        return stage.strategies
    so_far = set(schedule[: index + 1])
    return tuple(name for name in root.strategy.names if so_far & set(root.strategy.part(name).trains))


def stage_config(config: RunConfig, name: StageName) -> StageConfig:
    stage: StageConfig = getattr(config.stages, name)
    return stage


def trainable_globs(
    config: RunConfig, root: Injected, name: StageName, active: Sequence[str]
) -> tuple[str, ...]:
    """Globs over the root's parameter names that a stage trains, as configured or as its strategies declare."""
    stage = stage_config(config, name)
    if stage.train:
        return stage.train
    if name in ("images", "base"):
        return ("backbone.*",)
    stages = (name, "coarse") if stage.finetune_coarse else (name,)
    globs = []
    for strategy in active:
        part = root.strategy.part(strategy)
        globs += [f"strategy.{strategy}.{glob}" for s in stages for glob in part.trains.get(s, ())]
        globs += [f"backbone.{glob}" for s in stages for glob in part.trains_backbone.get(s, ())]
    if not globs:
        raise ValueError(
            f"stage {name!r} trains nothing: no strategy of {config.strategy!r} declares parameters for it;"
            f" set --stages.{name}.train, or leave the stage out of --schedule"
        )
    return tuple(globs)


def set_trainable(root: nn.Module, globs: Sequence[str]) -> dict[str, nn.Parameter]:
    """Freeze everything, thaw what the globs match, and return it by name. A glob that matches nothing is an error."""
    parameters = dict(root.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    chosen: dict[str, nn.Parameter] = {}
    for glob in globs:
        found = {name: p for name, p in parameters.items() if fnmatchcase(name, glob)}
        if not found:
            raise ValueError(
                f"train glob {glob!r} matches none of the {len(parameters)} parameters{suggest(glob, parameters)}"
            )
        chosen.update(found)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    count = sum(p.numel() for p in chosen.values())
    total = sum(p.numel() for p in parameters.values())
    log.info("training %.3f M of %.3f M parameters: %s", count / 1e6, total / 1e6, " ".join(globs))
    return chosen
