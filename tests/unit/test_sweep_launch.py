"""Launching points (stubs of runs): markers, retries, process groups, launches ahead of the turn."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from launch_stub import SLOT, alive, another_sweep, plan_of, started, statuses, stop_when

from dit_booth.files import Lock, read_lines
from dit_booth.study import launch
from dit_booth.study.board import write_hparams
from dit_booth.study.launch import run_points
from dit_booth.study.plan import Point
from dit_booth.study.processes import end_groups, error_lines, exit_text
from dit_booth.study.rows import ALL_COSTS, FAILED, LAUNCH, ROWS
from dit_booth.study.slots import Slot

pytestmark = pytest.mark.usefixtures("stub")


# ---- markers and failures ----------------------------------------------------------------------------------


def test_a_point_is_finished_by_its_marker_and_not_by_the_exit_code(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ok", "bad exit", "leave ranks")
    told: list[str] = []
    assert run_points(plan, [SLOT], grace=0.2, on_finished=lambda point: told.append(point.id))
    assert statuses(plan) == ["finished", "finished", "failed"]
    assert told == ["p0", "p1"]
    assert started(plan) == ["p0", "p1", "p2", "p2"]
    assert not alive(int((plan.run_folder(plan.points[2]) / "rank").read_text())), "its group was ended"
    seconds = json.loads((plan.run_folder(plan.points[0]) / LAUNCH).read_text())
    assert 0 < seconds["launch_seconds"] < seconds["launcher_seconds"]


def test_a_failure_is_tried_once_more_then_marked_and_the_rest_goes_on(tmp_path: Path) -> None:
    # Each has a stage of its own to train: none is launched ahead of its turn, however slow a start is.
    plan = plan_of(tmp_path, "fail", "fail once", "ok", stages=(("a",), ("b",), ("c",)))
    assert run_points(plan, [SLOT], grace=0.2)
    assert started(plan) == ["p0", "p0", "p1", "p1", "p2"]
    assert statuses(plan) == ["failed", "finished", "finished"]
    row = read_lines(plan.folder / ROWS)[0]
    assert row["error"] == ["error: it cannot be"]
    assert json.loads((plan.run_folder(plan.points[0]) / FAILED).read_text())["attempts"] == 2
    (plan.folder / "points" / "log").unlink()
    assert run_points(plan, [SLOT], grace=0.2, retries=0)
    assert started(plan) == ["p0"], "another time only what failed is tried"


def test_the_last_words_of_a_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("error: of another time\n")
    start = log.stat().st_size
    with log.open("a") as out:
        out.write(
            "\n".join([f"line {n}" for n in range(20)]) + "\n[x] [INFO] [launch.py:253:sigkill_handler] bye\n"
        )
    assert error_lines(log, start) == [f"line {n}" for n in range(12, 20)]
    with log.open("a") as out:
        out.write("error: a\nerror: a\nerror on rank 1: b\nthe end\n")
    assert error_lines(log, start) == ["error: a", "error on rank 1: b"]
    assert error_lines(log, log.stat().st_size) == ["it ended without output (killed?)"]


KILLED = """\
first step of coarse after 9.8 s
\rcoarse:   0%%|          | 0/40 [00:00<?, ?step/s]\rcoarse:  20%%|##        | 8/40 [00:01<00:03, 8.0step/s]\r%s
[2026-11-22 10:00:00,1] [INFO] [launch.py:337:sigkill_handler] Killing subprocess 41
[2026-11-22 10:00:00,2] [ERROR] [launch.py:343:sigkill_handler] ['python', 'run.py'] exits with return code = -9
"""
BAR = "coarse:  25%|##        | 10/40 [00:01<00:03, 8.0step/s]"


def test_the_last_words_of_a_killed_rank_are_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(KILLED % BAR)
    words = error_lines(log, 0)
    assert words[:2] == ["first step of coarse after 9.8 s", BAR], "a progress bar is one line"
    assert words[2].endswith("exits with return code = -9") and len(words) == 3


def test_a_traceback_is_not_displaced_by_a_line_that_looks_like_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trace = ["error_handler: installed", "Traceback (most recent call last):", "RuntimeError: no"]
    log.write_text("\r\n".join(trace))
    assert error_lines(log, 0) == trace


def test_how_a_launcher_ended() -> None:
    told = [exit_text(code) for code in (1, -9, 137, 247, 0, 255)]
    killed = [f"exit code {code}: SIGKILL" for code in (-9, 137, 247)]
    assert told == ["exit code 1", *killed, "exit code 0", "exit code 255"]


def test_what_follows_on_a_finished_point_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, "ok", "ok")

    def fail(point: Point) -> None:
        raise OSError("no space")

    assert run_points(plan, [SLOT], grace=0.2, on_finished=fail)
    assert statuses(plan) == ["finished", "finished"]
    assert caplog.text.count("OSError: no space") == 2


def test_two_sweeps_may_write_a_point_s_hparams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one comes first, between this one's look and its end."""
    plan = plan_of(tmp_path, "ok")
    row: dict[str, Any] = {"metrics": {}, **dict.fromkeys(ALL_COSTS), "step_seconds": 0.5}
    folder = tmp_path / "tensorboard" / "p0"
    replace = Path.replace

    def late(self: Path, target: Path) -> Path:
        target.mkdir()
        (target / "theirs").touch()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)
    write_hparams(plan, plan.points[0], row)
    assert [file.name for file in folder.iterdir()] == ["theirs"]
    assert list(folder.parent.iterdir()) == [folder]


# ---- stopping ----------------------------------------------------------------------------------------------


def test_out_of_time_every_point_may_write_a_checkpoint(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "long", "ok")
    begin = time.monotonic()
    assert not run_points(plan, [SLOT], seconds=2.0, grace=20.0)
    assert time.monotonic() - begin < 15
    assert (plan.run_folder(plan.points[0]) / "checkpoint").exists()
    assert statuses(plan) == ["waiting", "waiting"], "to be cut short is no failure"


def test_a_signal_stops_the_sweep_the_same_way(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "long")
    ready = plan.run_folder(plan.points[0]) / "ready"
    stop_when(ready)
    assert not run_points(plan, [SLOT], grace=20.0)
    assert (ready.parent / "checkpoint").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_group_that_hears_nothing_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(1, flush=True)"
    code += "; time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    threading.Timer(
        1.0, process.send_signal, [signal.SIGKILL]
    ).start()  # what SIGTERM's ten seconds would end in
    end_groups([process], 0.1)
    assert process.poll() == -signal.SIGKILL
    end_groups([process], 0.1)  # nobody is left


def test_who_outlives_a_launcher_holds_no_other_point_up(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "leave deaf ranks", "ok", "ok")
    assert run_points(plan, [Slot("x"), Slot("y")], grace=6.0, retries=0)
    assert statuses(plan) == ["failed", "finished", "finished"]
    folders = [plan.run_folder(point) for point in plan.points]
    judged, third = (folders[0] / FAILED).stat().st_mtime, (folders[2] / "finished").stat().st_mtime
    assert third < judged - 1.0
    assert not alive(int((folders[0] / "rank").read_text()))


# ---- ahead of the turn -------------------------------------------------------------------------------------


def test_the_next_point_is_launched_while_this_one_samples(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sample", "ok", stages=(("a",), ("b",)))
    assert run_points(plan, [SLOT], grace=0.2)
    first, second = (plan.run_folder(point) for point in plan.points)
    trained = (plan.store / "a-0" / "weights.safetensors").stat().st_mtime
    ended = (first / "finished").stat().st_mtime
    assert trained < (second / "pid").stat().st_mtime < ended - 1.0
    lines = read_lines(plan.folder / "points" / "log")
    assert [line["point"] for line in lines] == ["p0", "p1"]
    assert lines[1]["at"] > ended, "it waited for its turn"
    launch = json.loads((second / LAUNCH).read_text())
    assert 0 < launch["launch_seconds"] < launch["launcher_seconds"] < 4.5, "which do not count its waiting"


def test_the_next_point_goes_on_when_this_one_has_left_its_devices(tmp_path: Path) -> None:
    """DeepSpeed's launcher looks after its ranks once a second only, and they have files to close."""
    plan = plan_of(tmp_path, "end slowly", "slow start")
    assert run_points(plan, [SLOT], grace=0.2)
    assert statuses(plan) == ["finished", "finished"]
    first = plan.run_folder(plan.points[0])
    ended = (first / "finished").stat().st_mtime
    assert ended < read_lines(plan.folder / "points" / "log")[1]["at"] < ended + 5.9
    assert json.loads((first / LAUNCH).read_text())["launcher_seconds"] < 5.9, "as long as it had its devices"
    assert (first / LAUNCH).stat().st_mtime > ended + 5.9, "it is judged when nobody is left of it"


def test_a_point_that_waits_starts_elsewhere_where_a_slot_is_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=launch.__name__)
    plan = plan_of(tmp_path, "sample long", "slow start", "ok", stages=(("a",), ("b",), ("c",)))
    done = plan.run_folder(plan.points[2]) / LAUNCH
    stop_when(done)
    assert not run_points(plan, [Slot("x"), Slot("y")], grace=0.2)
    starts = [text.split(": ") for text in caplog.messages if ": started " in text or ": ended " in text]
    assert [(who.split()[-1], what) for who, what in starts] == [
        ("(p0)", "started on x"),
        ("(p1)", "started on y"),
        ("(p2)", "started on x ahead of its turn"),
        ("(p2)", "ended while waiting, because another slot is free"),
        ("(p2)", "started on y"),
    ]
    assert read_lines(plan.folder / "points" / "log")[-1]["slot"] == "y"
    assert statuses(plan) == ["waiting", "finished", "finished"]
    assert json.loads(done.read_text())["attempts"] == 1


def test_who_waits_ends_with_its_sweep(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "sample", "ok")
    sweep = another_sweep(plan)
    folder = plan.run_folder(plan.points[1])
    while not (folder / "pid").is_file() or not (folder / "pid").read_text():
        time.sleep(0.02)
    pid = int((folder / "pid").read_text())
    sweep.kill()
    sweep.wait()
    limit = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < limit, "it waits for ever"
        time.sleep(0.05)
    assert started(plan) == ["p0"], "it never had its turn"
    assert "the sweep ended before it was this run's turn" in (folder / "launch.log").read_text()
    while Lock(plan.run_folder(plan.points[0])).held():  # the one that had goes on
        time.sleep(0.05)
    assert run_points(plan, [SLOT], grace=0.2)
    assert started(plan) == ["p0", "p1"]
