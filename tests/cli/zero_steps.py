"""Train ten steps with a frozen base on the backbones and at the ZeRO stages given: what `test_zero.py` launches.

Without averages, which would hide most of a difference. `2o` is stage 2 with the optimizer's state in CPU memory.

With a warm-up, as runs have: Adam's first step divides a gradient by its own size. Of one element's, 4e-9 where the
median is 2e-4, rounding alone made a tenth of a full step (1.02e-5 at stage 3; 1.1e-6 at stages 1 and 2).

deepspeed tests/cli/zero_steps.py --out FOLDER --runs dit-1 dit-2o unet-3
python tests/cli/zero_steps.py --out FOLDER --runs dit-0 unet-0
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dit_booth.components import build
from dit_booth.config.parse import parse
from dit_booth.training.address import stages_of
from dit_booth.training.distributed import start, stop
from dit_booth.training.loop import train_stage

SETTINGS = (
    "--config experiments/configs/demo.yaml --strategy kv_concat --schedule fine --stages.fine.steps 10"
    " --stages.fine.lr 1e-4 --stages.fine.warmup 5 --stages.fine.drop 0.3 --data.size 12 --data.frames 3"
    " --train.batch-size 8 --train.clip 1.0 --train.ema 0"
)
# As small as the networks are, DeepSpeed would keep every parameter whole, and take seconds to find that out.
GATHER_ALWAYS = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}


def main() -> None:
    given = argparse.ArgumentParser()
    given.add_argument("--out", type=Path, required=True)
    given.add_argument("--runs", nargs="+", required=True)
    given.add_argument("--local_rank", type=int)
    args = given.parse_args()
    ranks = start()
    for run in args.runs:
        backbone, zero = run.split("-")
        folder = args.out / f"{backbone}-{ranks.world}-zero{zero}"
        folder.mkdir(parents=True, exist_ok=True)
        engine = folder / "ds.json"
        settings: dict[str, Any] = {"stage": int(zero[0]), **GATHER_ALWAYS}
        if zero.endswith("o"):
            settings["offload_optimizer"] = {"device": "cpu"}
        engine.write_text(json.dumps({"zero_optimization": settings}))
        ranks.barrier()
        config = parse(
            [*SETTINGS.split(), "--backbone", backbone, "--ds-config", str(engine), "--out", str(folder)]
        )
        (stage,) = stages_of(config)
        train_stage(build(config).to(ranks.device), stage, folder, ranks, None)
    (args.out / f"modules-{ranks.world}-{ranks.rank}").write_text("\n".join(sys.modules))
    stop()


if __name__ == "__main__":
    main()
