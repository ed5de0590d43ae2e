"""Ownership of a sweep's folder: one sweep by name, and one set of points at any moment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from dit_booth.files import Lock
from dit_booth.study.plan import SweepPlan

RUNNING = "running"
"""File in a sweep's folder that its processes lock together; it identifies their points."""


def check_name(folder: Path, name: str) -> None:
    """Raise ValueError if the folder holds a sweep of another name, whose table would be replaced."""
    file = folder / "sweep.yaml"
    there = (yaml.safe_load(file.read_text()) or {}).get("name") if file.is_file() else None
    if there not in (None, name):
        raise ValueError(
            f"{folder} holds the sweep {there!r}, and this one is {name!r}; choose another --out"
        )


@contextmanager
def shared_folder(plan: SweepPlan) -> Iterator[None]:
    """Share the folder with the processes that run the same points there.

    A changed description may use the folder once those have ended: shared stages are found by their address.

    Raises:
        ValueError: processes are running other points there; two tables would replace each other in one file.
    """
    points = json.dumps([str(plan.store), *sorted(point.id for point in plan.points)])
    identity = hashlib.sha256(points.encode()).hexdigest()[:12]
    lock = Lock(plan.folder, RUNNING)
    for _ in range(5):  # another process may be entering at this moment
        if lock.share() and lock.owner().split()[-1:] == [identity]:
            break
        lock.release()
        if lock.take(identity):  # no process is there
            lock.share()
            break
        time.sleep(0.1)
    else:
        host, pid, _ = lock.owner().split()
        raise ValueError(
            f"{plan.folder} is being run with other points (begun by process {pid} on {host}); wait until that sweep"
            " ends, or choose another --out (with --store, stages can be shared)"
        )
    try:
        yield
    finally:
        lock.release()
