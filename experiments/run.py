"""Train the stages of a strategy, sample videos from held-out image prompts, and measure them.

    deepspeed experiments/run.py --strategy kv_concat
    python experiments/run.py --strategy token_replacement+kv_concat --backbone unet --stages.fine.steps 500

Settings come from the --config file (default: experiments/configs/demo.yaml) and, over it, from the command line.
The same command resumes an interrupted run.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late: --help and a wrong flag answer before DeepSpeed and diffusers load
    from torch import Tensor

    from dit_booth.config import RunConfig
    from dit_booth.training.build import Parts
    from dit_booth.training.distributed import Ranks
    from dit_booth.training.journal import Journal

DEFAULT_CONFIG = str(Path(__file__).parent / "configs" / "demo.yaml")
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
    from dit_booth.cli import parse

    config = parse(argv, default_config=DEFAULT_CONFIG, description=__doc__ or "")
    folder = Path(config.folder())
    check_folder(folder, config)
    if (folder / "finished").is_file():
        log.info("this run is finished, nothing to do; --out FOLDER makes another one\n%s", describe(folder))
        return 0
    from dit_booth.training.distributed import start, stop

    try:
        run(config, start(), begin)
    finally:
        stop()
    return 0


def run(config: RunConfig, ranks: Ranks, begin: float) -> None:
    """The main job: train every stage, sample, measure, and say where everything is."""
    from dit_booth.training.journal import Journal
    from dit_booth.training.stage import schedule_of
    from experiments.sample import measure, sample_heldout

    folder = Path(config.folder())
    parts = fresh_parts(config, ranks)
    schedule = schedule_of(config, parts.root)
    log.info(
        "%s on %s, ranks: %d, stages: %s", config.strategy, config.backbone, ranks.world, " ".join(schedule)
    )
    log.info("run folder: %s", folder)
    if ranks.first:
        claim(folder, config)
    ranks.barrier()
    journal = Journal(folder) if ranks.first else None
    parts = train(parts, folder, ranks, journal, begin)
    samples = folder / "samples"
    rows = sample_heldout(parts, samples, ranks)
    if journal and rows:
        means = measure(parts, rows, samples)
        journal.line({"samples": means})
        for name, statistic in means.items():
            journal.board.add_scalar(f"samples/{name}", statistic["mean"])
        for number, row in enumerate(rows[:4]):
            journal.video(f"samples/{number:03d}", row.video, config.sample.fps)
    if journal:
        journal.close()
        (folder / "finished").write_text("")
        log.info("%s", describe(folder))


def fresh_parts(config: RunConfig, ranks: Ranks) -> Parts:
    from dit_booth.training.build import build

    return build(config).to(ranks.device)


def check_folder(folder: Path, config: RunConfig) -> None:
    """ValueError, listing what differs, if another run has begun in the folder."""
    import yaml

    from dit_booth.config import decisive

    settings = folder / "run.yaml"
    begun = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "finished"))
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

    from dit_booth.models.weights import write_text

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))


def train(parts: Parts, folder: Path, ranks: Ranks, journal: Journal | None, begin: float) -> Parts:
    """Train the stages that are not finished yet, each from the weights of those before it."""
    from dit_booth.models.weights import load_strictly, part, read, write
    from dit_booth.training.stage import active_strategies, schedule_of
    from dit_booth.training.trainer import train_stage

    config = parts.config
    trained: dict[str, Tensor] = {}
    schedule = schedule_of(config, parts.root)
    for index, name in enumerate(schedule):
        active = active_strategies(config, parts.root, schedule, index)
        weights = folder / "checkpoints" / f"{index}_{name}" / "weights.safetensors"
        if not weights.is_file():
            train_stage(parts, name, index, active, weights.parent, ranks, journal, begin)
            # DeepSpeed keeps its hooks on a module: the next stage gets a new one.
            parts = fresh_parts(config, ranks)
        trained |= read(weights)
        load_strictly(parts.root, trained, str(weights), partial=True)
        parts.root.active = tuple(active)
    if ranks.first and trained:
        write(
            folder / "weights.safetensors",
            {k: v for k, v in parts.root.state_dict().items() if not k.startswith("strategy.")},
        )
        write(folder / "strategy.safetensors", part(trained, "strategy."), {"strategy": config.strategy})
    return parts.to(ranks.device)


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
