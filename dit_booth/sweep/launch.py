"""Running a sweep's points: each by a launcher in a session of its own, several at once where there are devices.

A point counts as finished by the marker that its run writes last. What its launcher returns says nothing: DeepSpeed's
can exit with 0 and leave its ranks behind, so the whole process group is ended before the point is judged.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dit_booth.files import SLOT, Lock, write_text
from dit_booth.sweep.plan import PROGRAM, Plan, Point
from dit_booth.sweep.rows import (
    FAILED,
    LAUNCH,
    in_use,
    is_finished,
    missing_stages,
    read_json,
    status_of,
    write_rows,
)

log = logging.getLogger(__name__)
LOG = "launch.log"
RESERVED = "reserved"
"""File in a point's folder that the sweep locks while it runs the point: a run takes its own lock seconds later."""
ERROR_LINES = 8
ERROR = re.compile(r"error( on rank \d+)?:")
"""How a line begins in which a run says what is wrong."""
EXIT = "exits with return code"
"""What DeepSpeed's launcher says of a rank that failed, the only word there is of one that was killed."""
RANK = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CROSS_RANK",
    "CROSS_SIZE",
)
"""Variables of a launcher that started this process: a point's launcher sets its own."""


@dataclass(frozen=True)
class Slot:
    """Where one point runs at a time."""

    name: str
    flags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def places(self) -> set[tuple[str, str]]:
        """Its devices, each with its machine."""
        return places(socket.gethostname(), self.name)


@dataclass
class Running:
    """A point that runs, or is being ended."""

    point: Point
    slot: Slot
    process: subprocess.Popen[bytes]
    begin: float
    log_start: int
    reservation: Lock


def run_points(
    plan: Plan,
    slots: Sequence[Slot],
    *,
    retries: int = 1,
    seconds: float | None = None,
    grace: float = 60.0,
    finished: Callable[[Point], None] = lambda point: None,
) -> bool:
    """Run what is missing; whether nothing was cut short (a point that failed is marked, and the rest goes on).

    `seconds`: stop then, as at SIGINT and SIGTERM: every point gets `grace` seconds to write a checkpoint.
    """
    return _Runner(plan, slots, retries, seconds, grace, finished).run()


class _Runner:
    def __init__(
        self,
        plan: Plan,
        slots: Sequence[Slot],
        retries: int,
        seconds: float | None,
        grace: float,
        finished: Callable[[Point], None],
    ) -> None:
        self.plan, self.slots, self.retries, self.grace, self.finished = plan, slots, retries, grace, finished
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.attempts: Counter[str] = Counter()
        self.running: dict[str, Running] = {}  # by slot
        self.stopping = False

    def run(self) -> bool:
        for point in self.plan.points:  # a failure of an earlier time is tried again
            (self.plan.run_folder(point) / FAILED).unlink(missing_ok=True)
        write_rows(self.plan)
        old = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not self._out_of_time() and (self.running or self._todo()):
                self._collect()
                self._start_some()
                time.sleep(0.2)
            done = not self.running and not self._todo()
        finally:
            end_groups([running.process for running in self.running.values()], self.grace)
            for running in self.running.values():
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
        here = {running.point.id for running in self.running.values()}
        points = [p for p in self.plan.points if p.id not in here and status_of(self.plan, p) == "waiting"]
        return sorted(points, key=lambda point: point.seed)

    def _start_some(self) -> None:
        free = [slot for slot in self.slots if slot.name not in self.running]
        if not free:
            return
        todo = self._todo()
        elsewhere = [point for point in todo if is_taken(self.plan.run_folder(point))]
        taken = {place for point in elsewhere for place in places_taken(self.plan.run_folder(point))}
        busy = [*elsewhere, *(running.point for running in self.running.values())]
        in_training = {stage.key for point in busy for stage in missing_stages(self.plan, point)}
        for point in todo:
            slot = next((slot for slot in free if not slot.places() & taken), None)
            if slot is None:
                return
            wanted = {stage.key for stage in missing_stages(self.plan, point)}
            if point in elsewhere or wanted & in_training:
                continue  # the lock would make it wait; another point may run meanwhile
            reservation = Lock(self.plan.run_folder(point), RESERVED)
            if not reservation.take(slot.name):
                return  # another sweep was quicker: look anew what it has taken
            if status_of(self.plan, point) != "waiting":  # it was even done with the point
                reservation.release()
                continue
            self.running[slot.name] = self._start(point, slot, reservation)
            free.remove(slot)
            in_training |= wanted

    def _start(self, point: Point, slot: Slot, reservation: Lock) -> Running:
        self.attempts[point.id] += 1
        folder = self.plan.run_folder(point)
        write_settings(self.plan, point)
        with (folder / LOG).open("ab") as out:
            begin = out.tell()
            process = subprocess.Popen(
                command(self.plan, point, slot),
                env=environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        again = "" if self.attempts[point.id] == 1 else f", attempt {self.attempts[point.id]}"
        log.info("%s: started on %s%s", title(point), slot.name, again)
        return Running(point, slot, process, time.monotonic(), begin, reservation)

    def _collect(self) -> None:
        for running in list(self.running.values()):
            if running.process.poll() is None:
                continue
            end_groups([running.process], self.grace)  # ranks that outlived their launcher
            del self.running[running.slot.name]
            self._judge(running)
            running.reservation.release()

    def _judge(self, running: Running) -> None:
        point, folder = running.point, self.plan.run_folder(running.point)
        wall, tries = time.monotonic() - running.begin, self.attempts[point.id]
        if is_finished(folder):
            overhead = wall - read_json(folder / "cost.json").get("work_seconds", wall)
            seconds = {"attempts": tries, "launcher_seconds": wall, "launch_seconds": overhead}
            write_text(folder / LAUNCH, json.dumps(seconds) + "\n")
            self._tell(point)
            log.info("%s: finished in %.0f s, %.0f s of them launching", title(point), wall, overhead)
        else:
            error, code = last_words(folder / LOG, running.log_start), running.process.returncode
            words = " | ".join(error[-2:])
            log.info("%s: failed after %.0f s (%s): %s", title(point), wall, ending(code), words)
            if tries > self.retries:
                failure = {"attempts": tries, "exit": code, "error": error}
                write_text(folder / FAILED, json.dumps(failure) + "\n")
        write_rows(self.plan)

    def _tell(self, point: Point) -> None:
        """Whatever the caller makes of a finished point, the other points run on."""
        try:
            self.finished(point)
        except Exception:
            log.warning("%s: finished, but what follows on that failed", title(point), exc_info=True)


def is_taken(folder: Path) -> bool:
    """Whether another sweep has reserved a point, or a living process runs it."""
    return in_use(folder) or Lock(folder, RESERVED).held()


def places_taken(folder: Path) -> set[tuple[str, str]]:
    """Where a taken point runs: as its ranks tell, and as the sweep that started it did (hosts of pdsh do not)."""
    owners = (Lock(folder).owner().split(), Lock(folder, RESERVED).owner().split())
    return {place for owner in owners if len(owner) == 3 for place in places(owner[0], owner[2])}


def places(host: str, slot: str) -> set[tuple[str, str]]:
    """Devices and their machine: of ``gpu:0,1`` and ``cpu`` it is `host`, of ``worker-1:0,1`` the one named."""
    machine, _, devices = slot.rpartition(":")
    return {(host if machine in ("", "gpu") else machine, device) for device in devices.split(",")}


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


def command(plan: Plan, point: Point, slot: Slot, *more: str) -> list[str]:
    """The command line of a point's run."""
    program = [str(PROGRAM), "--config", str(plan.run_folder(point) / "run.yaml"), *more]
    if plan.launcher == "python":
        return [sys.executable, *program]
    return [deepspeed(), "--master_port", str(free_port()), *slot.flags, *program]


def deepspeed() -> str:
    """The launcher beside this Python."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        raise ValueError(
            "launcher is deepspeed, which is not installed; pip install deepspeed, or set launcher: python"
        )
    return found


def environment(slot: Slot) -> dict[str, str]:
    """This process's, without what a launcher has set, with the slot's."""
    own = {name: value for name, value in os.environ.items() if name not in RANK}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"  # the launcher calls `python` by name
    return {**own, "PATH": path, **slot.env, SLOT: slot.name}


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def end_groups(processes: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End launchers and all processes of their sessions that are left: gently, then firmly, then at once."""
    left = list(processes)
    for number, patience in ((signal.SIGINT, grace), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        left = [process for process in left if _signal(process, number)]
        limit = time.monotonic() + patience
        while left and time.monotonic() < limit:
            time.sleep(0.1)
            left = [process for process in left if _signal(process, 0)]


def _signal(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a launcher's group; whether anybody is left in it."""
    process.poll()  # takes the launcher's own exit: it would count as somebody
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def last_words(file: Path, start: int) -> list[str]:
    """The lines in which a run says what is wrong, or else its last ones."""
    with file.open("rb") as read:
        read.seek(start)
        text = read.read().decode(errors="replace")
    # A progress bar is one line, which it writes anew after every \r.
    lines = [line.rstrip().rpartition("\r")[2] for line in text.split("\n")]
    errors = list(dict.fromkeys(line for line in lines if ERROR.match(line)))
    if errors:
        return errors[-ERROR_LINES:]
    own = [line for line in lines if line.strip() and (EXIT in line or not _of_launcher(line))]
    return own[-ERROR_LINES:] or ["it ended without a word (killed?)"]


def _of_launcher(line: str) -> bool:
    return "[launch.py:" in line or "[runner.py:" in line


def ending(code: int) -> str:
    """How a launcher ended: Python tells a signal as -9, a shell as 137, DeepSpeed's launcher of its rank as 247."""
    for number in (-code, code - 128, 256 - code):
        if 1 < number < 32:
            return f"exit code {code}: {signal.Signals(number).name}"
    return f"exit code {code}"


# ---- where points run --------------------------------------------------------------------------------------


def local_slots(ranks: int, devices: Sequence[str] | None) -> list[Slot]:
    """This machine's GPUs, `ranks` for each point; without any, one slot on the CPU. ValueError: too few devices."""
    if devices is None:
        devices = visible_devices()
    if not devices:
        return [Slot("cpu", env={"LOCAL_SIZE": str(ranks)})]  # so many ranks DeepSpeed starts on a CPU
    if len(devices) < ranks:
        raise ValueError(
            f"ranks is {ranks} and devices are {','.join(devices)}; give as many devices, or fewer ranks"
        )
    groups = [devices[at : at + ranks] for at in range(0, len(devices) - ranks + 1, ranks)]
    return [Slot(f"gpu:{','.join(group)}", env={"CUDA_VISIBLE_DEVICES": ",".join(group)}) for group in groups]


def visible_devices() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def hostfile_slots(ranks: int, hostfile: Path, launcher: str = "deepspeed") -> list[Slot]:
    """The devices of a hostfile's machines (``name slots=8`` lines), `ranks` of one machine for each point.

    ValueError: the file is none or wrong, or points cannot be started on other machines.
    """
    if launcher != "deepspeed":
        raise ValueError(
            f"launcher is {launcher}, which starts points on this machine only; set launcher: deepspeed, or leave"
            " --hostfile out"
        )
    if shutil.which("pdsh") is None:
        raise ValueError(
            "--hostfile: DeepSpeed starts points on other machines by pdsh, which is not installed; apt install pdsh"
        )
    if not hostfile.is_file():
        raise ValueError(f"--hostfile {hostfile} is not a file; write lines such as `worker-1 slots=8`")
    out = []
    for number, line in enumerate(hostfile.read_text().splitlines(), 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        named = re.fullmatch(r"(\S+)\s+slots=(\d+)", entry)
        if named is None:
            raise ValueError(f"{hostfile}:{number}: {line!r}; write lines such as `worker-1 slots=8`")
        host, count = named[1], int(named[2])
        for first in range(0, count - ranks + 1, ranks):
            devices = ",".join(str(device) for device in range(first, first + ranks))
            # Without --force_multi a single machine counts as this one.
            flags = ("--hostfile", str(hostfile), "--include", f"{host}:{devices}", "--force_multi")
            out.append(Slot(f"{host}:{devices}", flags))
    if not out:
        raise ValueError(f"{hostfile}: no machine has {ranks} slots; lower the sweep's ranks")
    return out
