"""The trained parameters of a stage: the active strategies, and the trainable parameters by glob."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dit_booth.config import STAGES, RunConfig, StageConfig, StageName
from dit_booth.errors import suggest
from dit_booth.models.injected import Injected
from dit_booth.strategy import Strategy, find

log = logging.getLogger(__name__)


def schedule_of(config: RunConfig) -> tuple[StageName, ...]:
    """Return the stages of a run: as configured, or those of coarse and fine in which a strategy trains."""
    if config.schedule:
        return config.schedule
    trained = {stage for cls in find(config.strategy).values() for stage in cls.stages()}
    return tuple(stage for stage in STAGES if stage in trained and stage in ("coarse", "fine"))


def frames_of_training(config: RunConfig) -> int:
    """Return the most latent frames that a video of the run's stages has: of ``data.frames``, or the longest crop."""
    stages = [stage_config(config, name) for name in schedule_of(config)]
    lengths = [stage.frames_of(config.data.frames) for stage in stages if not stage.single_frames]
    return config.autoencoder.latent_frames(max(lengths, default=config.data.frames))


def active_strategies(config: RunConfig, schedule: Sequence[StageName], index: int) -> tuple[str, ...]:
    """Return a stage's active strategies: as configured, or those that it or an earlier stage trains."""
    stage, classes = stage_config(config, schedule[index]), find(config.strategy)
    for name in stage.strategies:
        if name not in classes:
            raise ValueError(
                f"stages.{schedule[index]}.strategies names {name!r}, which is not in strategy {config.strategy!r};"
                " add it with +"
            )
    if stage.strategies:
        return stage.strategies
    so_far = set(schedule[: index + 1])
    return tuple(name for name, cls in classes.items() if so_far & cls.stages())


def stage_config(config: RunConfig, name: StageName) -> StageConfig:
    stage: StageConfig = getattr(config.stages, name)
    return stage


def trainable_globs(
    config: RunConfig, model: Injected, name: StageName, active: Sequence[str]
) -> tuple[str, ...]:
    """Return globs over the names of a stage's trained parameters: as configured, or as its strategies declare."""
    return declared_globs(config, name, {strategy: model.strategy.part(strategy) for strategy in active})


def declared_globs(
    config: RunConfig, name: StageName, active: Mapping[str, Strategy | type[Strategy]]
) -> tuple[str, ...]:
    """Return the globs of strategies, given as instances or classes. ValueError: they train nothing in this stage."""
    globs = _declared(config, name, active)
    if not globs:
        raise ValueError(
            f"stage {name!r} trains nothing: no strategy of {config.strategy!r} declares parameters for it;"
            f" set --stages.{name}.train, or leave the stage out of --schedule"
        )
    return globs


def _declared(
    config: RunConfig, name: StageName, active: Mapping[str, Strategy | type[Strategy]]
) -> tuple[str, ...]:
    stage = stage_config(config, name)
    if stage.train:
        return stage.train
    if name in ("images", "base"):
        return ("backbone.*",)
    stages = (name, "coarse") if stage.finetune_coarse else (name,)
    globs = []
    for strategy, part in active.items():
        globs += [f"strategy.{strategy}.{glob}" for s in stages for glob in part.trains.get(s, ())]
        globs += [f"backbone.{glob}" for s in stages for glob in part.trains_backbone.get(s, ())]
    return tuple(globs)


def check_starts(config: RunConfig, model: Injected, loaded: Collection[str]) -> None:
    """Check that a stage of 0 steps gets its parameters from a source (`loaded`: names) or from a stage before it.

    A strategy at its warm start, as if there were no image, would sample plausible videos: ValueError names it. Where
    a stage with steps follows, such a start may be meant, and is one line in the log.
    """
    schedule, have = schedule_of(config), {f"strategy.{name}" for name in loaded}
    steps = [stage_config(config, name).steps for name in schedule]
    for index, name in enumerate(schedule):
        active = active_strategies(config, schedule, index)
        globs = _declared(config, name, {strategy: model.strategy.part(strategy) for strategy in active})
        taken = {
            parameter
            for parameter, _ in model.strategy.named_parameters(prefix="strategy")
            if _takes_part(parameter, active) and any(fnmatchcase(parameter, glob) for glob in globs)
        }
        left = Counter(".".join(parameter.split(".")[1:3]) for parameter in taken - have)
        have |= taken
        if steps[index] or not left:
            continue
        found = ", ".join(f"{group} ({count} parameters)" for group, count in sorted(left.items()))
        if not any(steps[index + 1 :]):
            raise ValueError(
                f"stages.{name}.steps is 0, but neither weights nor strategy_weights has {found}; add a file that does"
                f" to --strategy-weights, or train it with --stages.{name}.steps"
            )
        log.info("stage %s has 0 steps, and no file has %s: that stays at its start", name, found)


def set_trainable(
    model: nn.Module, globs: Sequence[str], active: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters that match the globs; return those by name. ValueError: no match.

    With `active`, the parameters of other strategies stay frozen: they take no part, so a stage's result does not
    depend on them.
    """
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    total = sum(p.numel() for p in parameters.values())
    if active is not None:
        parameters = {name: p for name, p in parameters.items() if _takes_part(name, active)}
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
    log.info("training %.3f M of %.3f M parameters: %s", count / 1e6, total / 1e6, " ".join(globs))
    return chosen


def _takes_part(name: str, active: Sequence[str]) -> bool:
    owner, _, rest = name.partition(".")
    return owner != "strategy" or rest.partition(".")[0] in active
