"""Run a sweep's points: each by a launcher in its own session, one per slot at a time.

A point is finished when its run has written its marker. A launcher's exit code says nothing: DeepSpeed's can be 0 with
ranks left behind, so the whole process group is ended before the point is judged.

Launching takes seconds that need no device, so a slot's next point is launched once the current one has trained its
stages: it imports and builds while that one samples and measures, then waits for its turn (`study.turns`).
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import yaml

from dit_booth.files import Lock, write_text
from dit_booth.study.plan import Point, SweepPlan
from dit_booth.study.processes import end_groups, ending_group, error_lines, exit_text, is_ending
from dit_booth.study.rows import (
    FAILED,
    LAUNCH,
    in_use,
    is_finished,
    missing_stages,
    read_json,
    status_of,
    write_rows,
)
from dit_booth.study.slots import Slot, environment, places
from dit_booth.study.turns import give_turn

log = logging.getLogger(__name__)
LOG = "launch.log"
RUN = "dit_booth.run"
"""Module that runs a point; launchers start it by name, so an installed package needs no script."""
RESERVED = "reserved"
"""File in a point's folder that the sweep locks as it starts the point; the run takes its own lock seconds later."""


@dataclass
class RunningPoint:
    """A point with living processes."""

    point: Point
    slot: Slot
    process: subprocess.Popen[bytes]
    begin: float  # of its turn on the slot's devices; before that, of its launch
    log_start: int
    reservation: Lock
    waits: bool = True  # for its turn
    freed: float | None = None  # when it freed the slot's devices
    recalled: bool = False  # to start on another slot
    ends: Iterator[None] | None = None  # the steps of ending its processes


def run_points(
    plan: SweepPlan,
    slots: Sequence[Slot],
    *,
    retries: int = 1,
    seconds: float | None = None,
    grace: float = 60.0,
    on_finished: Callable[[Point], None] = lambda point: None,
) -> bool:
    """Run the missing points. Returns False if the sweep was interrupted; failed points are marked and skipped.

    After `seconds`, as after SIGINT or SIGTERM, every point gets `grace` seconds to write a checkpoint. A point that
    fails is tried again up to `retries` times. `on_finished` is called for each finished point.
    """
    return _Runner(plan, slots, retries, seconds, grace, on_finished).run()


class _Runner:
    def __init__(
        self,
        plan: SweepPlan,
        slots: Sequence[Slot],
        retries: int,
        seconds: float | None,
        grace: float,
        on_finished: Callable[[Point], None],
    ) -> None:
        self.plan, self.slots, self.retries, self.grace = plan, slots, retries, grace
        self.on_finished = on_finished
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.attempts: Counter[str] = Counter()
        self.running: list[RunningPoint] = []
        self.stopping = False

    def run(self) -> bool:
        for point in self.plan.points:  # failures of earlier runs are tried again
            (self.plan.run_folder(point) / FAILED).unlink(missing_ok=True)
        write_rows(self.plan)
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self._out_of_time() and (self.running or self._missing()):
                ended = self._collect_ended()
                self._give_turns()
                self._start_points()
                self._write_results(ended)  # slow, so only after the next points have started
                time.sleep(0.2)
            done = not self.running and not self._missing()
        finally:
            end_groups([running.process for running in self.running], self.grace)
            for running in self.running:
                running.reservation.release()
            for number, handler in old.items():
                signal.signal(number, handler)
        write_rows(self.plan)
        return done

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _out_of_time(self) -> bool:
        return self.stopping or (self.deadline is not None and time.monotonic() > self.deadline)

    def _missing(self) -> list[Point]:
        """Return points to start, lowest seeds first: an interrupted sweep has complete tables of some seeds."""
        here = {running.point.id for running in self.running}
        points = [p for p in self.plan.points if p.id not in here and status_of(self.plan, p) == "waiting"]
        return sorted(points, key=lambda point: point.seed)

    # ---- starting ----

    def _points_on(self, slot: Slot) -> list[RunningPoint]:
        return [running for running in self.running if running.slot is slot]

    def _start_points(self) -> None:
        """Start points on empty slots, then ahead of their turn on slots whose only point has trained its stages."""
        empty = [slot for slot in self.slots if not self._points_on(slot)]
        free = [*empty, *filter(self._may_start_ahead, self.slots)]
        if not free:
            return
        todo = self._missing()
        elsewhere = [point for point in todo if is_taken(self.plan.run_folder(point))]
        taken = {place for point in elsewhere for place in places_taken(self.plan.run_folder(point))}
        free = [slot for slot in free if not slot.places() & taken]
        busy = [*elsewhere, *(running.point for running in self.running)]
        in_training = {stage.key for point in busy for stage in missing_stages(self.plan, point)}
        for point in todo:
            if not free:
                return
            wanted = {stage.key for stage in missing_stages(self.plan, point)}
            if point in elsewhere or wanted & in_training:
                continue  # it would wait for a lock; another point can run now
            reservation = Lock(self.plan.run_folder(point), RESERVED)
            if not reservation.take(free[0].name):
                return  # another sweep was faster: look again at what it has taken
            if status_of(self.plan, point) != "waiting":  # the other sweep has finished it already
                reservation.release()
                continue
            self._start(point, free.pop(0), reservation)
            in_training |= wanted
        if any(slot in empty for slot in free):
            self._recall()

    def _may_start_ahead(self, slot: Slot) -> bool:
        there = self._points_on(slot)
        return slot.ahead and len(there) == 1 and not any(missing_stages(self.plan, there[0].point))

    def _recall(self) -> None:
        """End a point that waits for its turn, so that it starts on an empty slot; it has done nothing yet."""
        for running in self.running:
            if running.waits and running.ends is None:
                log.info("%s: ended while waiting, because another slot is free", title(running.point))
                running.recalled, running.ends = True, ending_group(running.process, self.grace)
                return

    def _start(self, point: Point, slot: Slot, reservation: Lock) -> None:
        self.attempts[point.id] += 1
        folder = self.plan.run_folder(point)
        write_settings(self.plan, point)
        with (folder / LOG).open("ab") as out:
            log_start = out.tell()
            process = subprocess.Popen(
                run_command(self.plan, point, slot),
                env=environment(slot),
                stdin=subprocess.PIPE if slot.ahead else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(RunningPoint(point, slot, process, time.monotonic(), log_start, reservation))
        self._give_turns()
        ahead = " ahead of its turn" if self.running[-1].waits else ""
        again = "" if self.attempts[point.id] == 1 else f", attempt {self.attempts[point.id]}"
        log.info("%s: started on %s%s%s", title(point), slot.name, ahead, again)

    def _give_turns(self) -> None:
        """Let waiting points continue once no other point uses their slot's devices.

        A finished point that has unlocked its folder has freed its devices; its launcher ends seconds later.
        """
        for running in self.running:
            folder = self.plan.run_folder(running.point)
            if running.freed is None and is_finished(folder) and not in_use(folder):
                running.freed = time.monotonic()
        for running in self.running:
            others = [
                other
                for other in self._points_on(running.slot)
                if other is not running and other.freed is None
            ]
            if running.waits and running.ends is None and not others:
                if running.process.stdin is not None:
                    give_turn(running.process.stdin, self.plan.ranks)
                running.waits, running.begin = False, time.monotonic()

    # ---- ending ----

    def _collect_ended(self) -> list[Point]:
        """Judge the points whose processes have all ended, without waiting. Returns these points."""
        out = []
        for running in list(self.running):
            if running.ends is None and running.process.poll() is not None:  # ranks may have outlived it
                running.ends = ending_group(running.process, self.grace)
            if running.ends is None or is_ending(running.ends):
                continue
            self.running.remove(running)
            if running.recalled:
                self.attempts[running.point.id] -= 1
            else:
                self._judge(running)
                out.append(running.point)
            running.reservation.release()
        return out

    def _judge(self, running: RunningPoint) -> None:
        point, folder = running.point, self.plan.run_folder(running.point)
        wall, tries = (running.freed or time.monotonic()) - running.begin, self.attempts[point.id]
        if is_finished(folder):
            overhead = wall - read_json(folder / "cost.json").get("work_seconds", wall)
            seconds = {"attempts": tries, "launcher_seconds": wall, "launch_seconds": overhead}
            write_text(folder / LAUNCH, json.dumps(seconds) + "\n")
            log.info("%s: finished in %.0f s, %.0f s of them launching", title(point), wall, overhead)
        else:
            error, code = error_lines(folder / LOG, running.log_start), running.process.returncode
            words = " | ".join(error[-2:])
            log.info("%s: failed after %.0f s (%s): %s", title(point), wall, exit_text(code), words)
            if tries > self.retries:
                failure = {"attempts": tries, "exit": code, "error": error}
                write_text(folder / FAILED, json.dumps(failure) + "\n")

    def _write_results(self, points: Sequence[Point]) -> None:
        """Write the rows and call `on_finished`; an error in it does not stop the other points."""
        if points:
            write_rows(self.plan)
        for point in points:
            if not is_finished(self.plan.run_folder(point)):
                continue
            try:
                self.on_finished(point)
            except Exception:
                log.warning("%s: finished, but processing its results failed", title(point), exc_info=True)


def is_taken(folder: Path) -> bool:
    """Return whether another sweep has reserved a point, or a living process runs it."""
    return in_use(folder) or Lock(folder, RESERVED).held()


def places_taken(folder: Path) -> set[tuple[str, str]]:
    """Return (machine, device) pairs of a taken point, by its own and its sweep's lock (pdsh sets only this)."""
    owners = (Lock(folder).owner().split(), Lock(folder, RESERVED).owner().split())
    return {place for owner in owners if len(owner) == 3 for place in places(owner[0], owner[2])}


def title(point: Point) -> str:
    return f"{point.label}, seed {point.seed} ({point.id})"


def write_settings(plan: SweepPlan, point: Point) -> Path:
    """Write the ``run.yaml`` that a point's run is started with. Returns its path."""
    file = plan.run_folder(point) / "run.yaml"
    settings = {**point.settings, "out": str(plan.run_folder(point)), "store": str(plan.store)}
    text = yaml.safe_dump(settings, sort_keys=False)
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)
    return file


def run_command(plan: SweepPlan, point: Point, slot: Slot) -> list[str]:
    """Return the command line of a point's run."""
    run = [RUN, "--config", str(plan.run_folder(point) / "run.yaml")]
    if plan.launcher == "python":
        return [sys.executable, "-m", *run]
    return [deepspeed_launcher(), "--master_port", str(free_port()), *slot.flags, "--module", *run]


def deepspeed_launcher() -> str:
    """Return the path of DeepSpeed's launcher, preferably the one beside this Python."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ValueError(
            "launcher is deepspeed, which is not installed; pip install deepspeed, or set launcher: python"
        )
    return found


def free_port() -> int:
    """Return a port of this machine that is not in use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
