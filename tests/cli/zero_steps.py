"""Train ten steps with a frozen base on both backbones, at the ZeRO stages given: what `test_zero.py` launches.

deepspeed tests/cli/zero_steps.py --out FOLDER --zero 1 2 3
python tests/cli/zero_steps.py --out FOLDER --zero 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dit_booth.cli import parse
from dit_booth.training.address import stages_of
from dit_booth.training.build import build
from dit_booth.training.distributed import start, stop
from dit_booth.training.trainer import train_stage

SETTINGS = (
    "--config experiments/configs/demo.yaml --strategy kv_concat --schedule fine --stages.fine.steps 10"
    " --stages.fine.lr 1e-4 --stages.fine.warmup 1 --stages.fine.drop 0.3 --data.size 12 --data.frames 3"
    " --train.batch-size 8 --train.clip 1.0"
)
BACKBONES = ("dit", "unet")


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--out", type=Path, required=True)
    given.add_argument("--zero", type=int, nargs="+", required=True)
    given.add_argument("--local_rank", type=int)
    args = given.parse_args()
    ranks = start()
    for backbone in BACKBONES:
        for zero in args.zero:
            folder = args.out / f"{backbone}-{ranks.world}-zero{zero}"
            folder.mkdir(parents=True, exist_ok=True)
            engine = folder / "ds.json"
            engine.write_text(
                json.dumps({"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}})
            )
            ranks.barrier()
            config = parse(
                [*SETTINGS.split(), "--backbone", backbone, "--ds-config", str(engine), "--out", str(folder)]
            )
            (stage,) = stages_of(config)
            train_stage(build(config).to(ranks.device), stage, folder, ranks, None, 0.0)
    stop()


if __name__ == "__main__":
    main()
