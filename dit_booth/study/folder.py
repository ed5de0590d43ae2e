"""Whose a sweep's folder is: the sweep's of one name, and at a time that of processes that run the same points."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from dit_booth.files import Lock
from dit_booth.study.plan import Plan

RUNNING = "running"
"""File in a sweep's folder that its processes lock together; it says which points they run."""


def check_name(folder: Path, name: str) -> None:
    """ValueError: the folder holds the sweep of another name, whose table would be replaced."""
    file = folder / "sweep.yaml"
    there = (yaml.safe_load(file.read_text()) or {}).get("name") if file.is_file() else None
    if there not in (None, name):
        raise ValueError(
            f"{folder} holds the sweep {there!r}, and this one is {name!r}; choose another --out"
        )


@contextmanager
def running(plan: Plan) -> Iterator[None]:
    """Share the folder with the processes that run the same points there.

    ValueError: other points are being run there, so that two tables would take turns in one file. Once they are not, a
    changed description may go on in the folder: what it shares with the one before is there by its address.
    """
    points = json.dumps([str(plan.store), *sorted(point.id for point in plan.points)])
    identity = hashlib.sha256(points.encode()).hexdigest()[:12]
    lock = Lock(plan.folder, RUNNING)
    for _ in range(5):  # more than once: another process may just be coming in
        if lock.share() and lock.owner().split()[-1:] == [identity]:
            break
        lock.release()
        if lock.take(identity):  # nobody is there
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
