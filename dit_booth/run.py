"""Train the stages of a strategy, sample videos from held-out image prompts, and measure them.

    deepspeed experiments/run.py --strategy kv_concat
    python experiments/run.py --strategy token_replacement+kv_concat --backbone unet --stages.fine.steps 500

Settings come from the --config file (default: experiments/configs/demo.yaml) and, over it, from the command line.
The same command resumes an interrupted run.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late: --help and a wrong flag answer before DeepSpeed and diffusers load
    from torch import Tensor

    from dit_booth.components import Components
    from dit_booth.config import RunConfig
    from dit_booth.training.address import Stage
    from dit_booth.training.distributed import Ranks
    from dit_booth.training.metrics_logger import MetricsLogger

from dit_booth.files import packaged

log = logging.getLogger("dit_booth")


def main(argv: list[str]) -> int:
    """0: finished; 1: an error, said in one line; 2: a bad flag; 130: interrupted, resumable."""
    begin = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))  # the launcher's
    logging.basicConfig(
        level=logging.ERROR if rank else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    log.setLevel(logging.ERROR if rank else logging.INFO)
    try:
        return start_run(argv, begin)
    except KeyboardInterrupt as stopped:
        log.info("\n%s", stopped or "stopped; the same command resumes")
        return 130
    except (ValueError, OSError) as error:
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 1


def start_run(argv: list[str], begin: float) -> int:
    """Read the settings; if there is anything left to do, join the other ranks and do it."""
    with collector_at_rest():
        from dit_booth.config.parse import parse

        config = parse(argv, default_config=str(packaged("configs/demo.yaml")), description=__doc__ or "")
    folder = Path(config.folder())
    check_folder(folder, config)
    if (folder / "finished").is_file():
        log.info("this run is finished, nothing to do; --out FOLDER makes another one\n%s", describe(folder))
        return 0
    from dit_booth.study.turns import await_turn
    from dit_booth.training.distributed import free_memory, owning, start, stop

    with collector_at_rest():
        load_modules()
    components = fresh_parts(config)
    begin += await_turn()
    try:
        ranks = start()
        with owning(folder, ranks):
            if ranks.broadcast((folder / "finished").is_file()):
                log.info("another process has finished this run meanwhile\n%s", describe(folder))
            else:
                run(components.to(ranks.device), ranks, begin)
            del (
                components
            )  # its device is free before the folder is unlocked: another point may wait for just that
            free_memory(ranks)
    finally:
        stop()
    return 0


def load_modules() -> None:
    """Import all that a run needs: seconds without any device, which may pass before it is the run's turn on one."""
    from dit_booth.training.distributed import import_deepspeed

    import_deepspeed()
    for name in (
        "dit_booth.training.loop",
        "dit_booth.training.metrics_logger",
        "dit_booth.sampling.command",
        "open_clip",
    ):
        import_module(name)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Without garbage collection, which would go over what imports make, again and again: a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is there now stays, so later collections leave it out
        gc.enable()


def run(components: Components, ranks: Ranks, begin: float) -> None:
    """The main job: train every stage, sample, measure, and say where everything is."""
    from dit_booth.files import write_text
    from dit_booth.sampling.command import measure, sample_heldout
    from dit_booth.training.address import stages_of
    from dit_booth.training.metrics_logger import MetricsLogger
    from dit_booth.training.stage import check_starts
    from dit_booth.training.stage_cost import write_run_cost

    config = components.config
    folder = Path(config.folder())
    check_starts(config, components.model, components.sourced)
    stages = until(ranks.broadcast(stages_of(config) if ranks.first else []), config.stop_after)
    names = " ".join(stage.name for stage in stages)
    log.info("%s on %s, ranks: %d, stages: %s", config.strategy, config.backbone, ranks.world, names)
    log.info("run folder: %s", folder)
    if ranks.first:
        claim(folder, config)
    ranks.barrier()
    logger = MetricsLogger(folder, begin) if ranks.first else None
    components = train(components, stages, folder, ranks, logger)
    if config.stop_after:
        log.info("ended after stage %s, as --stop-after asks; without it, the run goes on", config.stop_after)
        return
    trained, samples = time.perf_counter(), folder / "samples"
    rows = sample_heldout(components, samples, ranks)
    if logger and rows:
        means = measure(components, rows, samples)
        logger.line({"samples": means})
        for name, statistic in means.items():
            logger.board.add_scalar(f"samples/{name}", statistic["mean"])
        for number, row in enumerate(rows[:4]):
            logger.video(f"samples/{number:03d}", row.video, config.sample.fps)
    if logger:
        logger.close()
        now = time.perf_counter()
        sampling = now - trained
        seconds = {
            "wall_seconds": now - begin,
            "sample_seconds": sampling,
            "work_seconds": logger.seconds + sampling,
        }
        write_run_cost(folder, config, stages, seconds)
        write_text(folder / "finished", "")  # the last file: now all others are there, whole
        log.info("%s", describe(folder))


def until(stages: list[Stage], last: str) -> list[Stage]:
    """The stages up to `last`; all of them if it is empty."""
    names: list[str] = [stage.name for stage in stages]
    if last and last not in names:
        raise ValueError(
            f"stop_after is {last!r}, and the run's stages are {', '.join(names)}; name one of them"
        )
    return stages[: names.index(last) + 1] if last else stages


def fresh_parts(config: RunConfig) -> Components:
    from dit_booth.components import build

    return build(config)


def check_folder(folder: Path, config: RunConfig) -> None:
    """ValueError, listing what differs, if another run has begun in the folder."""
    import yaml

    from dit_booth.config import decisive

    settings = folder / "run.yaml"
    traces = ("metrics.jsonl", "finished", "checkpoints/*/latest.json", "checkpoints/*/weights.safetensors")
    begun = any(True for name in traces for _ in folder.glob(name))
    if not (begun and settings.is_file()):  # a run that failed before its first step left nothing to lose
        return
    changed = differences(decisive(yaml.safe_load(settings.read_text())), decisive(config.as_dict()))
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(f"{folder} holds another run ({'; '.join(changed[:5])}{more}); choose another --out")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Settings that differ, as ``name: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{name}: {old} there, {new} here"]


def claim(folder: Path, config: RunConfig) -> None:
    """Create the run folder with its ``run.yaml``, which repeats the run: ``--config <folder>/run.yaml``."""
    import yaml

    from dit_booth.files import write_text

    write_text(folder / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))


def train(
    components: Components,
    stages: list[Stage],
    folder: Path,
    ranks: Ranks,
    logger: MetricsLogger | None,
) -> Components:
    """Train the stages that are not finished yet, each from the weights of those before it."""
    from dit_booth.models.fingerprint import metadata
    from dit_booth.models.weights import load_strictly, part, read, write

    config = components.config
    trained: dict[str, Tensor] = {}
    for stage in stages:
        components.model.active = stage.active
        if not stage.steps:
            continue
        if train_if_needed(components, stage, ranks, logger):
            # DeepSpeed keeps its hooks on a module: the next stage gets a new one.
            components = fresh_parts(config).to(ranks.device)
        weights = stage.folder(config) / "weights.safetensors"
        trained |= read(weights)
        load_strictly(components.model, trained, str(weights), partial=True)
        components.model.active = stage.active
    if ranks.first and not config.stop_after:
        state = components.model.state_dict()
        own = {name: value for name, value in state.items() if not name.startswith("strategy.")}
        write(folder / "weights.safetensors", own)
        about = metadata(components.model.backbone, components.model.strategy)
        write(folder / "strategy.safetensors", part(state, "strategy."), about)
    return components.to(ranks.device)


def train_if_needed(components: Components, stage: Stage, ranks: Ranks, logger: MetricsLogger | None) -> bool:
    """Train a stage unless it is finished, or another run finishes it meanwhile; whether it was trained here."""
    from dit_booth.training.distributed import owning
    from dit_booth.training.loop import train_stage

    folder = stage.folder(components.config)
    marker = folder / "weights.safetensors"  # written last and whole
    if not ranks.broadcast(marker.is_file()):
        with owning(folder, ranks):
            if not ranks.broadcast(marker.is_file()):
                train_stage(components, stage, folder, ranks, logger)
                return True
    log.info("stage %s is finished: %s", stage.name, folder)
    if logger:
        logger.begin(stage.name, folder, stage.steps)
    return False


def describe(folder: Path) -> str:
    """Where a finished run's files are."""
    return "\n".join(
        [
            f"run folder      {folder}",
            f"contact sheet   {folder / 'samples' / 'contact_sheet.png'}",
            f"videos          {folder / 'samples'}/*.mp4, metrics.jsonl",
            f"weights         {folder / 'strategy.safetensors'}, weights.safetensors, checkpoints/",
            f"curves          tensorboard --logdir {folder / 'tensorboard'}",
        ]
    )
