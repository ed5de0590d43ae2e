"""Train two steps at ZeRO stages 1 to 3, with and without validation: what `test_validated_runs.py` launches.

ZeRO-3 is as DeepSpeed has it by default: it keeps parameters as small as these whole between their uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.sampling.validation import identity_curve
from dit_booth.training.address import stages_of
from dit_booth.training.distributed import Ranks, start, stop
from dit_booth.training.loop import train_stage
from dit_booth.training.metrics_logger import MetricsLogger

SETTINGS = (
    "--strategy kv_concat --weights none --clip.pretrained none --dit.depth 1 --dit.hidden 32 --dit.heads 1"
    " --data.size 12 --data.frames 3 --schedule fine --stages.fine.steps 2 --stages.fine.lr 0.01"
    " --stages.fine.warmup 1 --stages.fine.train * --train.batch-size 2 --sampler.steps 2"
)
CASES = {
    "plain": "",
    "validated": "--train.validate-every 1 --train.validate-examples 3 --train.validate-prompts 1",
    "unaveraged": "--train.ema 0",
}


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--out", type=Path, required=True)
    given.add_argument("--zero", nargs="+", required=True)
    given.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    args = given.parse_args()
    ranks = start()
    for zero in args.zero:
        for name in args.cases:
            train(args.out / f"{name}-{ranks.world}-zero{zero}", int(zero), CASES[name], ranks)
    stop()


def train(folder: Path, zero: int, settings: str, ranks: Ranks) -> None:
    engine, own = folder / "ds.json", folder / "stage"
    own.mkdir(parents=True, exist_ok=True)
    engine.write_text(json.dumps({"zero_optimization": {"stage": zero}}))
    ranks.barrier()
    config = parse(
        [*SETTINGS.split(), *settings.split(), "--ds-config", str(engine), "--out", str(folder)],
        default_config="experiments/configs/demo.yaml",
    )
    (stage,) = stages_of(config)
    logger = MetricsLogger(folder, 0.0) if ranks.first else None
    train_stage(build(config).to(ranks.device), stage, own, ranks, logger, identity_curve)


if __name__ == "__main__":
    main()
