"""A stub of a run for the tests of launching: `act` says what it does; it logs, locks and marks as run.py does."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dit_booth.files import read_lines
from dit_booth.study import launch
from dit_booth.study.plan import Point, StageRef, SweepPlan
from dit_booth.study.rows import ROWS
from dit_booth.study.slots import Slot

STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import yaml
from dit_booth.files import Lock, write_text
from dit_booth.study.turns import await_turn
settings = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
out, store, act = Path(settings["out"]), Path(settings["store"]), settings["act"]
with (out.parent / "launched").open("a") as launched:
    launched.write(out.name + "\\n")
(out / "pid").write_text(str(os.getpid()))
if act == "slow start":
    time.sleep(2)
await_turn()
lock = Lock(out)
while not lock.take():
    time.sleep(0.05)
if (out / "finished").exists():
    sys.exit(0)
with (out.parent / "log").open("a") as log:
    log.write(json.dumps({"point": out.name, "slot": os.environ["DIT_BOOTH_SLOT"], "at": time.time()}) + "\\n")
if act == "fail" or (act == "fail once" and not (out / "tried").exists()):
    (out / "tried").touch()
    print("warning: nothing\\nerror: it cannot be\\n[launch.py:1] bye", flush=True)
    sys.exit(1)
if act in ("leave ranks", "leave deaf ranks"):
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);" if "deaf" in act else ""
    rank = subprocess.Popen([sys.executable, "-c", deaf + "import time; print(1, flush=True); time.sleep(600)"],
                            stdout=subprocess.PIPE)
    rank.stdout.readline()
    (out / "rank").write_text(str(rank.pid))
    sys.exit(0)
if act == "long":
    def stop(*_):
        (out / "checkpoint").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    (out / "ready").touch()
    time.sleep(600)
for key in settings["stages"]:
    stage = Lock(store / key)
    while not stage.take():
        time.sleep(0.05)
    if not (store / key / "weights.safetensors").exists():
        with (store / "trained").open("a") as log:
            log.write(key + "\\n")
        time.sleep(0.5)
        write_text(store / key / "weights.safetensors", "")
    stage.release()
time.sleep({"sample": 6, "sample long": 30}.get(act, 0.1))
write_text(out / "cost.json", json.dumps({"work_seconds": 0.1}))
write_text(out / "finished", "")
lock.release()
time.sleep(6 if act == "end slowly" else 0)
sys.exit(1 if act == "bad exit" else 0)
"""
SLOT = Slot("cpu")


def plan_of(folder: Path, *acts: str, stages: tuple[tuple[str, ...], ...] = ()) -> SweepPlan:
    points = []
    for number, act in enumerate(acts):
        keys = stages[number] if stages else ()
        settings: dict[str, Any] = {"act": act, "stages": [f"{key}-0" for key in keys]}
        points.append(
            Point(
                id=f"p{number}",
                label=act,
                group=f"g{number}",
                seed=0,
                baseline=False,
                options={},
                stages=tuple(StageRef(name=key, address="0", steps=1) for key in keys),
                settings=settings,
            )
        )
    return SweepPlan(
        name="s", folder=folder, store=folder / "stages", launcher="python", ranks=1, points=tuple(points)
    )


def started(plan: SweepPlan) -> list[str]:
    return [line["point"] for line in read_lines(plan.folder / "points" / "log")]


def statuses(plan: SweepPlan) -> list[str]:
    return [row["status"] for row in read_lines(plan.folder / ROWS)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def stop_when(file: Path) -> None:
    """Interrupt this process's sweep as soon as a file is there."""

    def interrupt() -> None:
        while not file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()


def another_sweep(plan: SweepPlan) -> subprocess.Popen[bytes]:
    """A process that runs the same plan, on a device of its own."""
    other = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pickle; from pathlib import Path;"
        "from dit_booth.study import launch; launch.RUN = sys.argv[2];"
        "plan = pickle.loads(Path(sys.argv[3]).read_bytes());"
        "print(launch.run_points(plan, [launch.Slot('theirs')], grace=0.2))"
    )
    (plan.folder / "plan").write_bytes(pickle.dumps(plan))
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", other, root, launch.RUN, str(plan.folder / "plan")]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def launched(plan: SweepPlan) -> list[str]:
    file = plan.folder / "points" / "launched"
    return file.read_text().split() if file.is_file() else []
