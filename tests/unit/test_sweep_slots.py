"""Launching points (stubs of runs) on several devices and from two sweeps on one folder; slots and commands."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_stub import SLOT, another_sweep, launched, plan_of, started, statuses

from dit_booth.files import Lock, read_lines
from dit_booth.study import launch
from dit_booth.study.launch import RESERVED, is_taken, places_taken, run_points
from dit_booth.study.plan import SweepPlan
from dit_booth.study.slots import Slot, hostfile_slots, local_slots, places

pytestmark = pytest.mark.usefixtures("stub")


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


def test_two_sweeps_on_one_folder_share_the_work(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "ok", "ok", "ok", "ok", stages=(("a",), ("a",), ("b",), ("b",)))
    second = another_sweep(plan)
    assert run_points(plan, [Slot("ours")], grace=0.2)
    assert second.communicate()[0].strip() == b"True"
    assert statuses(plan) == ["finished"] * 4
    assert sorted((plan.store / "trained").read_text().split()) == ["a-0", "b-0"]
    assert sorted(set(started(plan))) == ["p0", "p1", "p2", "p3"]
    assert len(started(plan)) == 4, "no point ran twice"


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


def test_a_point_runs_through_deepspeeds_launcher_on_two_ranks(tmp_path: Path) -> None:
    plan = SweepPlan(
        **{**vars(plan_of(tmp_path, "ok", stages=(("a",),))), "launcher": "deepspeed", "ranks": 2}
    )
    assert run_points(plan, local_slots(2, []), grace=0.2)
    assert statuses(plan) == ["finished"]
    assert launched(plan) == ["p0", "p0"], "by each of the ranks"
    assert (plan.store / "trained").read_text().split() == ["a-0"]


def test_points_are_launched_by_deepspeed_on_ports_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SweepPlan(**{**vars(plan_of(tmp_path, "ok")), "launcher": "deepspeed"})
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    (slot,) = local_slots(2, [])
    first, second = (launch.run_command(plan, plan.points[0], slot) for _ in range(2))
    assert Path(first[0]).name == "deepspeed" and first[1] == "--master_port"
    assert first[2] != second[2]
    assert first[3:6] == ["--module", launch.RUN, "--config"]
    env = launch.environment(slot)
    assert "RANK" not in env and "MASTER_PORT" not in env
    assert (env["LOCAL_SIZE"], env["DIT_BOOTH_SLOT"]) == ("2", "cpu")
