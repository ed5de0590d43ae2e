"""Every registered strategy under ZeRO-2 and ZeRO-3 on two CPU ranks: one launch, as each costs its seconds."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dit_booth.strategy import registered

ROOT = Path(__file__).parents[2]
RANKS = 2


@pytest.mark.slow
def test_partitioned_over_two_ranks_every_strategy_trains_as_in_one_piece() -> None:
    launcher = Path(sys.executable).parent / "deepspeed"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = subprocess.Popen(
        [str(launcher), "--master_port", str(port), "--module", "dit_booth.zero_testing"],
        cwd=ROOT,
        env={
            **inherited,
            "LOCAL_SIZE": str(RANKS),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{launcher.parent}{os.pathsep}{inherited['PATH']}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-4000:]
    for name, cls in registered().items():
        for backbone in ("dit-factorised", "unet"):
            line = f"{name} on {backbone}, ranks {RANKS}: ZeRO 2 and 3 as one piece"
            assert (line in output) == bool(cls.stages()), line  # `none` trains nothing
