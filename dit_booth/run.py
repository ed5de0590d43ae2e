"""Train the stages of a strategy, sample videos for prompts that training never shows, and measure them.

    dit-booth run --strategy kv_concat
    deepspeed experiments/run.py --strategy kv_concat
    python experiments/run.py --strategy token_replacement+kv_concat --backbone unet --stages.fine.steps 500

Settings come from the --config file (default: demo.yaml, which the package brings) and, over it, from the command line.
The same command resumes an interrupted run.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from dit_booth.files import packaged, write_text

if TYPE_CHECKING:  # imported late: --help and a wrong flag answer before DeepSpeed and diffusers load
    from torch import Tensor

    from dit_booth.components import Components
    from dit_booth.config import RunConfig
    from dit_booth.pipeline import Pipeline
    from dit_booth.training.address import Stage
    from dit_booth.training.distributed import Ranks
    from dit_booth.training.metrics_logger import MetricsLogger

log = logging.getLogger("dit_booth")


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: finished; 1: an error, said in one line; 2: a bad flag; 130: interrupted, resumable."""
    begin = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))  # the launcher's
    logging.basicConfig(
        level=logging.ERROR if rank else logging.WARNING, format="%(message)s", stream=sys.stderr
    )
    log.setLevel(logging.ERROR if rank else logging.INFO)
    try:
        with collector_at_rest():
            from dit_booth.config.parse import parse

            default = str(packaged("configs/demo.yaml"))
            config = parse(argv, default_config=default, description=__doc__ or "", prog=prog)
        run(config, begin)
    except KeyboardInterrupt as stopped:
        log.info("\n%s", str(stopped) or "stopped; the same command resumes")
        return 130
    except (ValueError, OSError) as error:
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 1
    return 0


def train(config: RunConfig) -> Pipeline:
    """Run a configuration to its end, or go on where it was stopped; return what it trained, ready to sample.

    The run's folder (`RunConfig.folder`) holds its files, as after ``dit-booth run``.
    ValueError: settings that cannot work. KeyboardInterrupt: stopped, resumable by the same call.
    """
    from dit_booth.pipeline import Pipeline

    if config.stop_after:
        raise ValueError(f"stop_after is {config.stop_after!r}; leave it empty to train all stages")
    run(config)
    return Pipeline.load(config.folder())


def run(config: RunConfig, begin: float | None = None) -> None:
    """Do what is left of a run, together with the other ranks; `begin`: when the program began (perf_counter)."""
    begin = time.perf_counter() if begin is None else begin
    folder = Path(config.folder())
    check_folder(folder, config)
    if (folder / "finished").is_file():
        log.info("this run is finished, nothing to do; --out FOLDER makes another one\n%s", describe(folder))
        return
    with collector_at_rest():
        load_modules()
    from dit_booth.components import build
    from dit_booth.study.turns import await_turn
    from dit_booth.training.distributed import free_memory, owning, start, stop

    components = build(config)
    begin += await_turn()
    try:
        ranks = start()
        with owning(folder, ranks):
            if ranks.broadcast((folder / "finished").is_file()):
                log.info("another process has finished this run meanwhile\n%s", describe(folder))
            else:
                train_and_sample(components.to(ranks.device), ranks, begin)
            del (
                components
            )  # frees its device before the folder is unlocked: a sweep's next point may wait for it
            free_memory(ranks)
    finally:
        stop()


def load_modules() -> None:
    """Import all that a run needs: seconds without any device, which may pass before it is the run's turn on one."""
    from dit_booth.training.distributed import import_deepspeed

    import_deepspeed()
    for name in (
        "dit_booth.training.loop",
        "dit_booth.training.metrics_logger",
        "dit_booth.sampling.measure",
        "open_clip",
    ):
        import_module(name)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Stop garbage collection, which would go over what imports make, again and again: a fifth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # what is there now stays, so later collections leave it out
        gc.enable()


def train_and_sample(components: Components, ranks: Ranks, begin: float) -> None:
    """Train every stage, sample, measure, and say where everything is."""
    from dit_booth.training.address import stages_of
    from dit_booth.training.metrics_logger import MetricsLogger
    from dit_booth.training.stage import check_starts
    from dit_booth.training.stage_cost import write_run_cost

    config = components.config
    folder = Path(config.folder())
    check_starts(config, components.model, components.loaded)
    stages = until(ranks.broadcast(stages_of(config) if ranks.first else []), config.stop_after)
    names = " ".join(stage.name for stage in stages)
    log.info("%s on %s, ranks: %d, stages: %s", config.strategy, config.backbone, ranks.world, names)
    log.info("run folder: %s", folder)
    if ranks.first:
        claim(folder, config)
    ranks.barrier()
    logger = MetricsLogger(folder, begin) if ranks.first else None
    components = train_stages(components, stages, folder, ranks, logger)
    if config.stop_after:
        log.info("ended after stage %s, as --stop-after asks; without it, the run goes on", config.stop_after)
        return
    trained = time.perf_counter()
    sample_and_measure(components, folder / "samples", ranks, logger)
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


def sample_and_measure(
    components: Components, folder: Path, ranks: Ranks, logger: MetricsLogger | None
) -> None:
    """Sample the prompts; on the first rank measure the videos, and log means and the first four videos."""
    from dit_booth.sampling.measure import measure
    from dit_booth.sampling.prompts import requests_of, sample_prompts

    sample = components.config.sample
    cases = sample_prompts(components, sample, requests_of(components, sample), folder, ranks)
    if logger and cases:
        own, *controls = measure(components, cases, folder).items()
        logger.line({"samples": own[1], "controls": dict(controls)})
        for name, statistic in own[1].items():
            logger.board.add_scalar(f"samples/{name}", statistic["mean"])
        for name, case in list(cases.items())[:4]:
            logger.video(f"samples/{name.removesuffix('.mp4')}", case.video, sample.fps)


def until(stages: list[Stage], last: str) -> list[Stage]:
    """Return the stages up to `last`; all of them if it is empty."""
    names: list[str] = [stage.name for stage in stages]
    if last and last not in names:
        raise ValueError(
            f"stop_after is {last!r}, and the run's stages are {', '.join(names)}; name one of them"
        )
    return stages[: names.index(last) + 1] if last else stages


def check_folder(folder: Path, config: RunConfig) -> None:
    """Raise ValueError, listing what differs, if another run has begun in the folder."""
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


def differences(old: object, new: object, name: str = "") -> list[str]:
    """Return the settings that differ, as ``name: old there, new here``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
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

    write_text(folder / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))


def train_stages(
    components: Components,
    stages: list[Stage],
    folder: Path,
    ranks: Ranks,
    logger: MetricsLogger | None,
) -> Components:
    """Train the stages that are not finished yet, each from the weights of those before it."""
    from dit_booth.components import build
    from dit_booth.models.weights import load_strictly, read

    config = components.config
    trained: dict[str, Tensor] = {}
    for stage in stages:
        components.model.active = stage.active
        if not stage.steps:
            continue
        if train_if_needed(components, stage, ranks, logger):
            # DeepSpeed keeps its hooks on a module: the next stage gets a new one.
            components = build(config).to(ranks.device)
        weights = stage.folder(config) / "weights.safetensors"
        trained |= read(weights)
        load_strictly(components.model, trained, str(weights), partial=True)
        components.model.active = stage.active
    if ranks.first and not config.stop_after:
        components.save_weights(folder)
    return components.to(ranks.device)


def train_if_needed(components: Components, stage: Stage, ranks: Ranks, logger: MetricsLogger | None) -> bool:
    """Train a stage unless it is finished, or another run finishes it meanwhile; True if it was trained here."""
    from dit_booth.sampling.prior import prior_images
    from dit_booth.sampling.validation import identity_curve
    from dit_booth.training.distributed import owning
    from dit_booth.training.loop import train_stage

    folder = stage.folder(components.config)
    marker = folder / "weights.safetensors"  # written last and whole
    if not ranks.broadcast(marker.is_file()):
        with owning(folder, ranks):
            if not ranks.broadcast(marker.is_file()):
                prior = prior_images(components, folder, ranks) if stage.name == "subject" else None
                train_stage(components, stage, folder, ranks, logger, identity_curve, prior)
                return True
    log.info("stage %s is finished: %s", stage.name, folder)
    if logger:
        logger.begin(stage.name, folder, stage.steps)
    return False


def describe(folder: Path) -> str:
    """Return lines that tell where a finished run's files are."""
    return "\n".join(
        [
            f"run folder      {folder}",
            f"contact sheet   {folder / 'samples' / 'contact_sheet.png'}",
            f"videos          {folder / 'samples'}/*.mp4, scores.jsonl, videos.csv",
            f"weights         {folder / 'strategy.safetensors'}, weights.safetensors, checkpoints/",
            f"curves          tensorboard --logdir {folder / 'tensorboard'}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
