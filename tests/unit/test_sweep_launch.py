"""Launching points (stubs of runs): markers, retries, process groups, devices, two sweeps on one folder."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dit_booth.files import Lock, read_lines
from dit_booth.sweep import launch
from dit_booth.sweep.board import write_hparams
from dit_booth.sweep.launch import RESERVED, is_taken, places_taken, run_points
from dit_booth.sweep.plan import Plan, Point, StageRef
from dit_booth.sweep.processes import end_groups, ending, last_words
from dit_booth.sweep.rows import ALL_COSTS, FAILED, LAUNCH, ROWS
from dit_booth.sweep.slots import Slot, hostfile_slots, local_slots, places

STUB = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
import yaml
from dit_booth.files import Lock, write_text
from dit_booth.turns import await_turn
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


@pytest.fixture(autouse=True)
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    monkeypatch.setattr(launch, "PROGRAM", file)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def plan_of(folder: Path, *acts: str, stages: tuple[tuple[str, ...], ...] = ()) -> Plan:
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
    return Plan(
        name="s", folder=folder, store=folder / "stages", launcher="python", ranks=1, points=tuple(points)
    )


def started(plan: Plan) -> list[str]:
    return [line["point"] for line in read_lines(plan.folder / "points" / "log")]


def statuses(plan: Plan) -> list[str]:
    return [row["status"] for row in read_lines(plan.folder / ROWS)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# ---- markers and failures ----------------------------------------------------------------------------------


def test_a_point_is_finished_by_its_marker_and_not_by_the_exit_code(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ok", "bad exit", "leave ranks")
    told: list[str] = []
    assert run_points(plan, [SLOT], grace=0.2, finished=lambda point: told.append(point.id))
    assert statuses(plan) == ["finished", "finished", "failed"]
    assert told == ["p0", "p1"]
    assert started(plan) == ["p0", "p1", "p2", "p2"]
    assert not alive(int((plan.run_folder(plan.points[2]) / "rank").read_text())), "its group was ended"
    seconds = json.loads((plan.run_folder(plan.points[0]) / LAUNCH).read_text())
    assert 0 < seconds["launch_seconds"] < seconds["launcher_seconds"]


def test_a_failure_is_tried_once_more_then_marked_and_the_rest_goes_on(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "fail", "fail once", "ok")
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
    assert last_words(log, start) == [f"line {n}" for n in range(12, 20)]
    with log.open("a") as out:
        out.write("error: a\nerror: a\nerror on rank 1: b\nthe end\n")
    assert last_words(log, start) == ["error: a", "error on rank 1: b"]
    assert last_words(log, log.stat().st_size) == ["it ended without a word (killed?)"]


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
    words = last_words(log, 0)
    assert words[:2] == ["first step of coarse after 9.8 s", BAR], "a progress bar is one line"
    assert words[2].endswith("exits with return code = -9") and len(words) == 3


def test_a_traceback_is_not_displaced_by_a_line_that_looks_like_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    trace = ["error_handler: installed", "Traceback (most recent call last):", "RuntimeError: no"]
    log.write_text("\r\n".join(trace))
    assert last_words(log, 0) == trace


def test_how_a_launcher_ended() -> None:
    told = [ending(code) for code in (1, -9, 137, 247, 0, 255)]
    killed = [f"exit code {code}: SIGKILL" for code in (-9, 137, 247)]
    assert told == ["exit code 1", *killed, "exit code 0", "exit code 255"]


def test_what_follows_on_a_finished_point_may_fail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, "ok", "ok")

    def fail(point: Point) -> None:
        raise OSError("no space")

    assert run_points(plan, [SLOT], grace=0.2, finished=fail)
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
    starts = [text.split(": ") for text in caplog.messages if ": started " in text]
    assert [(who.split()[-1], what) for who, what in starts] == [
        ("(p0)", "started on x"),
        ("(p1)", "started on y"),
        ("(p2)", "started on x ahead of its turn"),
        ("(p2)", "started too soon, for another place is free"),
        ("(p2)", "started on y"),
    ]
    assert read_lines(plan.folder / "points" / "log")[-1]["slot"] == "y"
    assert statuses(plan) == ["waiting", "finished", "finished"]
    assert json.loads(done.read_text())["attempts"] == 1


def stop_when(file: Path) -> None:
    """Interrupt this process's sweep as soon as a file is there."""

    def interrupt() -> None:
        while not file.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()


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


# ---- several at once ---------------------------------------------------------------------------------------


def test_points_run_on_all_devices_and_a_stage_that_they_share_is_trained_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ok", "ok", "ok", "ok", stages=(("a", "b"), ("a", "c"), ("a", "d"), ("e",)))
    assert run_points(plan, [Slot("x"), Slot("y")], grace=0.2)
    assert statuses(plan) == ["finished"] * 4
    trained = (plan.store / "trained").read_text().split()
    assert sorted(trained) == ["a-0", "b-0", "c-0", "d-0", "e-0"]
    lines = read_lines(plan.folder / "points" / "log")
    assert [line["point"] for line in lines[:2]] in (["p0", "p3"], ["p3", "p0"]), (
        "who would wait starts later"
    )
    assert {line["slot"] for line in lines} == {"x", "y"}


def another_sweep(plan: Plan) -> subprocess.Popen[bytes]:
    """A process that runs the same plan, on a device of its own."""
    other = (
        "import sys; sys.path.insert(0, sys.argv[1]); import pickle; from pathlib import Path;"
        "from dit_booth.sweep import launch; launch.PROGRAM = Path(sys.argv[2]);"
        "plan = pickle.loads(Path(sys.argv[3]).read_bytes());"
        "print(launch.run_points(plan, [launch.Slot('theirs')], grace=0.2))"
    )
    (plan.folder / "plan").write_bytes(pickle.dumps(plan))
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", other, root, str(launch.PROGRAM), str(plan.folder / "plan")]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ok", "ok", "ok", "ok", stages=(("a",), ("a",), ("b",), ("b",)))
    second = another_sweep(plan)
    assert run_points(plan, [Slot("ours")], grace=0.2)
    assert second.communicate()[0].strip() == b"True"
    assert statuses(plan) == ["finished"] * 4
    assert sorted((plan.store / "trained").read_text().split()) == ["a-0", "b-0"]
    assert sorted(set(started(plan))) == ["p0", "p1", "p2", "p3"]
    assert len(started(plan)) == 4, "no point ran twice"


def launched(plan: Plan) -> list[str]:
    file = plan.folder / "points" / "launched"
    return file.read_text().split() if file.is_file() else []


def test_a_point_is_reserved_before_its_run_has_the_lock(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "slow start", "slow start", "slow start", "slow start")
    second = another_sweep(plan)
    while not launched(plan):
        time.sleep(0.01)
    assert run_points(plan, [Slot("ours")], grace=0.2)
    assert second.communicate()[0].strip() == b"True"
    assert sorted(launched(plan)) == ["p0", "p1", "p2", "p3"], "no launcher waited for another"
    assert {line["slot"] for line in read_lines(tmp_path / "points" / "log")} == {"ours", "theirs"}


def test_a_killed_sweep_s_reservation_is_free_at_once(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "slow start")
    folder = plan.run_folder(plan.points[0])
    other = another_sweep(plan)
    while not launched(plan):
        time.sleep(0.01)
    assert is_taken(folder) and not Lock(folder).held(), "reserved, not locked"
    other.kill()
    other.wait()
    assert not is_taken(folder)
    assert run_points(plan, [SLOT], grace=0.2)
    assert statuses(plan) == ["finished"]
    assert started(plan) == ["p0"], "the one that lived on; the other finds it finished"
    assert not Lock(folder, RESERVED).held()


def test_where_others_run_is_told_by_machine_and_device(tmp_path: Path) -> None:
    assert places("here", "cpu") == {("here", "cpu")}
    assert places("here", "gpu:0,1") == {("here", "0"), ("here", "1")}
    assert places("here", "worker-1:1") == {("worker-1", "1")}
    assert not Slot("gpu:0").places() & places("another-machine", "gpu:0")
    assert Slot("gpu:0").places() & places(socket.gethostname(), "gpu:0,1")
    assert places_taken(tmp_path) == set()
    reservation = Lock(tmp_path, RESERVED)
    assert reservation.take("worker-1:2")
    reservation.release()
    (tmp_path / "lock").write_text("worker-1 77 \n")  # a rank that pdsh started knows no slot
    assert places_taken(tmp_path) == {("worker-1", "2")}


def test_a_point_that_outlived_its_sweep_keeps_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep was killed, its point was not: the next sweep lets it end and starts nothing beside it."""
    plan = plan_of(tmp_path, "ok", "ok")
    folder = plan.run_folder(plan.points[0])
    code = (
        "import sys, time; from pathlib import Path; from dit_booth.files import Lock, write_text;"
        "out = Path(sys.argv[1]); lock = Lock(out); lock.take(); print(1, flush=True); time.sleep(1.5);"
        "write_text(out / 'finished', '')"
    )
    orphan = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "DIT_BOOTH_SLOT": "cpu"},
        stdout=subprocess.PIPE,
    )
    assert orphan.stdout is not None
    orphan.stdout.readline()
    assert run_points(plan, [SLOT], grace=0.2)
    assert started(plan) == ["p1"]
    assert orphan.wait() == 0
    assert not Lock(folder).held()
    assert statuses(plan) == ["finished", "finished"]


# ---- slots and commands ------------------------------------------------------------------------------------


def test_slots_of_this_machine() -> None:
    assert [slot.env for slot in local_slots(2, ["0", "1", "2", "3", "4"])] == [
        {"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}
    ]  # fmt: skip
    (cpu,) = local_slots(2, [])
    assert (cpu.name, cpu.env) == ("cpu", {"LOCAL_SIZE": "2"})
    with pytest.raises(ValueError, match="ranks is 2 and devices are 0; give as many devices"):
        local_slots(2, ["0"])


def test_slots_of_a_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    file = tmp_path / "hosts"
    file.write_text("# ours\nworker-1 slots=4\n\nworker-2 slots=3 # old\n")
    with pytest.raises(ValueError, match="pdsh, which is not installed; apt install pdsh"):
        hostfile_slots(2, file)
    (tmp_path / "bin" / "pdsh").touch(0o755)
    with pytest.raises(ValueError, match="launcher is python, which starts points on this machine only"):
        hostfile_slots(2, file, "python")
    slots = hostfile_slots(2, file)
    assert [slot.name for slot in slots] == ["worker-1:0,1", "worker-1:2,3", "worker-2:0,1"]
    assert slots[1].flags == ("--hostfile", str(file), "--include", "worker-1:2,3", "--force_multi")
    with pytest.raises(ValueError, match="no machine has 8 slots"):
        hostfile_slots(8, file)
    for line in ("worker-1", "worker-1 4", "worker-1 slots=", "worker-1 slots=4 max=8"):
        file.write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"hosts:1: '{line}'; write lines such as"):
            hostfile_slots(1, file)
    with pytest.raises(ValueError, match="is not a file"):
        hostfile_slots(1, tmp_path / "none")


def test_points_are_launched_by_deepspeed_on_ports_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(**{**vars(plan_of(tmp_path, "ok")), "launcher": "deepspeed"})
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    (slot,) = local_slots(2, [])
    first, second = (launch.command(plan, plan.points[0], slot) for _ in range(2))
    assert Path(first[0]).name == "deepspeed" and first[1] == "--master_port"
    assert first[2] != second[2]
    env = launch.environment(slot)
    assert "RANK" not in env and "MASTER_PORT" not in env
    assert (env["LOCAL_SIZE"], env["DIT_BOOTH_SLOT"]) == ("2", "cpu")
