"""Running a sweep's points: each by a launcher in a session of its own, several at once where there are devices.

A point counts as finished by the marker that its run writes last. What its launcher returns says nothing: DeepSpeed's
can exit with 0 and leave its ranks behind, so the whole process group is ended before the point is judged.

Launching takes seconds that need no device, so a slot's next point is launched when the present one has trained its
stages: while that one samples and measures, the next imports and builds, then waits for its turn (`study.turns`).
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
from typing import Any

import yaml

from dit_booth.files import Lock, write_text
from dit_booth.study.plan import Plan, Point
from dit_booth.study.processes import end_groups, ending, ending_group, last_words, still
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
"""File in a point's folder that the sweep locks while it runs the point: a run takes its own lock seconds later."""


@dataclass
class Running:
    """A point whose processes live."""

    point: Point
    slot: Slot
    process: subprocess.Popen[bytes]
    begin: float  # of its turn on the slot's devices, or of its launch
    log_start: int
    reservation: Lock
    waits: bool = True  # for its turn
    left: float | None = None  # when it was done with the slot's devices
    recalled: bool = False  # to start elsewhere
    ends: Iterator[None] | None = None  # the steps of ending its processes


def run_points(
    plan: Plan,
    slots: Sequence[Slot],
    *,
    retries: int = 1,
    seconds: float | None = None,
    grace: float = 60.0,
    on_finished: Callable[[Point], None] = lambda point: None,
) -> bool:
    """Run what is missing; whether nothing was cut short (a point that failed is marked, and the rest goes on).

    `seconds`: stop then, as at SIGINT and SIGTERM: every point gets `grace` seconds to write a checkpoint.
    """
    return _Runner(plan, slots, retries, seconds, grace, on_finished).run()


class _Runner:
    def __init__(
        self,
        plan: Plan,
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
        self.running: list[Running] = []
        self.stopping = False

    def run(self) -> bool:
        for point in self.plan.points:  # a failure of an earlier time is tried again
            (self.plan.run_folder(point) / FAILED).unlink(missing_ok=True)
        write_rows(self.plan)
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self._out_of_time() and (self.running or self._todo()):
                ended = self._collect()
                self._give_turns()
                self._start_some()
                self._tell(ended)  # takes a while: the next points are on their way by now
                time.sleep(0.2)
            done = not self.running and not self._todo()
        finally:
            end_groups([running.process for running in self.running], self.grace)
            for running in self.running:
                running.reservation.release()
            for number, handler in old.items():
                signal.signal(number, handler)
        write_rows(self.plan)
        return done

    def _stop(self, number: int, frame: Any) -> None:
        self.stopping = True

    def _out_of_time(self) -> bool:
        return self.stopping or (self.deadline is not None and time.monotonic() > self.deadline)

    def _todo(self) -> list[Point]:
        """Points to start, lowest seeds first: a sweep that is cut short has whole tables of some seeds."""
        here = {running.point.id for running in self.running}
        points = [p for p in self.plan.points if p.id not in here and status_of(self.plan, p) == "waiting"]
        return sorted(points, key=lambda point: point.seed)

    # ---- starting ----

    def _on(self, slot: Slot) -> list[Running]:
        return [running for running in self.running if running.slot is slot]

    def _start_some(self) -> None:
        """Start points on empty slots, then ahead of their turn on those whose only point trains no more."""
        empty = [slot for slot in self.slots if not self._on(slot)]
        free = [*empty, *filter(self._may_start_ahead, self.slots)]
        if not free:
            return
        todo = self._todo()
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
                continue  # the lock would make it wait; another point may run meanwhile
            reservation = Lock(self.plan.run_folder(point), RESERVED)
            if not reservation.take(free[0].name):
                return  # another sweep was quicker: look anew what it has taken
            if status_of(self.plan, point) != "waiting":  # it was even done with the point
                reservation.release()
                continue
            self._start(point, free.pop(0), reservation)
            in_training |= wanted
        if any(slot in empty for slot in free):
            self._recall()

    def _may_start_ahead(self, slot: Slot) -> bool:
        there = self._on(slot)
        return slot.ahead and len(there) == 1 and not any(missing_stages(self.plan, there[0].point))

    def _recall(self) -> None:
        """End a point that waits for its turn, for a slot that is empty: it starts there, and has nothing to lose."""
        for running in self.running:
            if running.waits and running.ends is None:
                log.info("%s: started too soon, for another place is free", title(running.point))
                running.recalled, running.ends = True, ending_group(running.process, self.grace)
                return

    def _start(self, point: Point, slot: Slot, reservation: Lock) -> None:
        self.attempts[point.id] += 1
        folder = self.plan.run_folder(point)
        write_settings(self.plan, point)
        with (folder / LOG).open("ab") as out:
            log_start = out.tell()
            process = subprocess.Popen(
                command(self.plan, point, slot),
                env=environment(slot),
                stdin=subprocess.PIPE if slot.ahead else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(Running(point, slot, process, time.monotonic(), log_start, reservation))
        self._give_turns()
        ahead = " ahead of its turn" if self.running[-1].waits else ""
        again = "" if self.attempts[point.id] == 1 else f", attempt {self.attempts[point.id]}"
        log.info("%s: started on %s%s%s", title(point), slot.name, ahead, again)

    def _give_turns(self) -> None:
        """Let the points go on whose slots nobody else uses any more.

        Who is finished and has unlocked its folder has freed its devices: its launcher takes seconds more to notice.
        """
        for running in self.running:
            folder = self.plan.run_folder(running.point)
            if running.left is None and is_finished(folder) and not in_use(folder):
                running.left = time.monotonic()
        for running in self.running:
            others = [
                other for other in self._on(running.slot) if other is not running and other.left is None
            ]
            if running.waits and running.ends is None and not others:
                if running.process.stdin is not None:
                    give_turn(running.process.stdin, self.plan.ranks)
                running.waits, running.begin = False, time.monotonic()

    # ---- ending ----

    def _collect(self) -> list[Point]:
        """Judge the points whose processes have all ended, and say which these are. Never waits for one."""
        out = []
        for running in list(self.running):
            if running.ends is None and running.process.poll() is not None:  # ranks may have outlived it
                running.ends = ending_group(running.process, self.grace)
            if running.ends is None or still(running.ends):
                continue
            self.running.remove(running)
            if running.recalled:
                self.attempts[running.point.id] -= 1
            else:
                self._judge(running)
                out.append(running.point)
            running.reservation.release()
        return out

    def _judge(self, running: Running) -> None:
        point, folder = running.point, self.plan.run_folder(running.point)
        wall, tries = (running.left or time.monotonic()) - running.begin, self.attempts[point.id]
        if is_finished(folder):
            overhead = wall - read_json(folder / "cost.json").get("work_seconds", wall)
            seconds = {"attempts": tries, "launcher_seconds": wall, "launch_seconds": overhead}
            write_text(folder / LAUNCH, json.dumps(seconds) + "\n")
            log.info("%s: finished in %.0f s, %.0f s of them launching", title(point), wall, overhead)
        else:
            error, code = last_words(folder / LOG, running.log_start), running.process.returncode
            words = " | ".join(error[-2:])
            log.info("%s: failed after %.0f s (%s): %s", title(point), wall, ending(code), words)
            if tries > self.retries:
                failure = {"attempts": tries, "exit": code, "error": error}
                write_text(folder / FAILED, json.dumps(failure) + "\n")

    def _tell(self, points: Sequence[Point]) -> None:
        """Write the rows anew. Whatever the caller makes of a finished point, the other points run on."""
        if points:
            write_rows(self.plan)
        for point in points:
            if not is_finished(self.plan.run_folder(point)):
                continue
            try:
                self.on_finished(point)
            except Exception:
                log.warning("%s: finished, but what follows on that failed", title(point), exc_info=True)


def is_taken(folder: Path) -> bool:
    """Whether another sweep has reserved a point, or a living process runs it."""
    return in_use(folder) or Lock(folder, RESERVED).held()


def places_taken(folder: Path) -> set[tuple[str, str]]:
    """Where a taken point runs: as its ranks tell, and as the sweep that started it did (hosts of pdsh do not)."""
    owners = (Lock(folder).owner().split(), Lock(folder, RESERVED).owner().split())
    return {place for owner in owners if len(owner) == 3 for place in places(owner[0], owner[2])}


def title(point: Point) -> str:
    return f"{point.label}, seed {point.seed} ({point.id})"


def settings_of(plan: Plan, point: Point) -> dict[str, Any]:
    """All settings of a point's run, with its folders."""
    return {**point.settings, "out": str(plan.run_folder(point)), "store": str(plan.store)}


def write_settings(plan: Plan, point: Point) -> Path:
    """The point's ``run.yaml``, which its run is started with."""
    file = plan.run_folder(point) / "run.yaml"
    text = yaml.safe_dump(settings_of(plan, point), sort_keys=False)
    if not file.is_file() or file.read_text() != text:
        write_text(file, text)
    return file


def command(plan: Plan, point: Point, slot: Slot) -> list[str]:
    """Return the command line of a point's run."""
    run = [RUN, "--config", str(plan.run_folder(point) / "run.yaml")]
    if plan.launcher == "python":
        return [sys.executable, "-m", *run]
    return [deepspeed(), "--master_port", str(free_port()), *slot.flags, "--module", *run]


def deepspeed() -> str:
    """The launcher beside this Python."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ValueError(
            "launcher is deepspeed, which is not installed; pip install deepspeed, or set launcher: python"
        )
    return found


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
