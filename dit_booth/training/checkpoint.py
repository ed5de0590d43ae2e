"""Checkpoints of a stage: DeepSpeed's own files and the averages, on the disk before one rename makes them current."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from dit_booth.files import sync_all, write_text
from dit_booth.training.distributed import Ranks
from dit_booth.training.ema import Ema
from dit_booth.training.engine import Engine


def save(folder: Path, engine: Engine, ema: Ema | None, ranks: Ranks, step: int) -> None:
    """Write ``step<n>/``, point ``latest.json`` at it, drop the older ones. A cut leaves the old one current."""
    tag = f"step{step}"
    engine.save_checkpoint(
        str(folder), tag=tag, client_state={"step": step}, save_latest=False, exclude_frozen_parameters=True
    )
    if ema is not None:
        save_file(ema.shadow, folder / tag / f"ema_rank{ranks.rank}.safetensors")
    ranks.barrier()
    if ranks.first:
        sync_all(folder / tag)  # DeepSpeed only writes: after a power cut the tag could name empty files
        current = {"tag": tag, "ranks": ranks.world, "zero": engine.zero_optimization_stage()}
        write_text(folder / "latest.json", json.dumps(current))
        for old in folder.glob("step*"):
            if old.name != tag:
                shutil.rmtree(old)
    ranks.barrier()


def load(folder: Path, engine: Engine, ema: Ema | None, ranks: Ranks) -> int:
    """Continue from the latest checkpoint, and return the number of steps done (0 without a checkpoint).

    ValueError: it was written by another number of ranks or ZeRO stage.
    """
    latest = folder / "latest.json"
    if not latest.is_file():
        return 0
    found = json.loads(latest.read_text())
    here = {"ranks": ranks.world, "zero": engine.zero_optimization_stage()}
    if any(found[key] != here[key] for key in here):
        raise ValueError(
            f"{folder} was written by {found['ranks']} ranks at ZeRO stage {found['zero']}, this run has"
            f" {here['ranks']} at {here['zero']}; run it as begun, or remove {folder} to start the stage again"
        )
    _, state = engine.load_checkpoint(str(folder), tag=found["tag"], load_module_strict=False)
    if ema is not None:
        for name, value in load_file(folder / found["tag"] / f"ema_rank{ranks.rank}.safetensors").items():
            ema.shadow[name].copy_(value)
    return int(state["step"])
