"""Files that are whole or not there, and locks that end with their owner."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from disk import DiskLog

from dit_booth.files import Lock, partial_of, read_lines, remove_partials, replacing, write_text
from dit_booth.training.distributed import Ranks, T, owning

HOLD = """
import sys
from pathlib import Path
from dit_booth.files import Lock
rank, child, lock = int(sys.argv[2]), sys.argv[3:], Lock(Path(sys.argv[1]))
print(lock.take() if rank == 0 else lock.join(rank) or True, flush=True)
if child:
    import os, time
    if os.fork() == 0:
        time.sleep(600)
    print("forked", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that holds a lock as `rank` until it ends."""

    def __init__(self, folder: Path, rank: int = 0, *more: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), str(rank), *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.took = self.process.stdout.readline().strip() == "True"
        if more:
            self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def hold() -> Iterator[type[Holder]]:
    made: list[Holder] = []

    class Kept(Holder):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            made.append(self)

    yield Kept
    for holder in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.process.pid, signal.SIGKILL)
        holder.process.wait()


# ---- locks -------------------------------------------------------------------------------------------------


def test_one_owner_at_a_time_and_a_killed_ones_lock_is_free(tmp_path: Path, hold: type[Holder]) -> None:
    lock = Lock(tmp_path)
    assert not lock.held()
    assert not (tmp_path / "lock").exists(), "looking leaves nothing behind"
    first = hold(tmp_path)
    assert first.took and lock.held() and not lock.take()
    assert str(first.process.pid) in lock.owner()
    assert not hold(tmp_path).took
    first.kill()
    assert not lock.held()
    assert lock.take()
    assert not hold(tmp_path).took, "now it is ours"
    lock.release()
    assert hold(tmp_path).took


def test_a_lock_is_held_as_long_as_one_rank_lives(tmp_path: Path, hold: type[Holder]) -> None:
    ranks = [hold(tmp_path, rank) for rank in range(3)]
    lock = Lock(tmp_path)
    ranks[0].kill()
    assert not lock.take()
    ranks[2].kill()
    assert not lock.take()
    ranks[1].kill()
    assert lock.take()
    lock.release()


def test_a_child_does_not_inherit_the_lock(tmp_path: Path, hold: type[Holder]) -> None:
    """A data reader that outlives a killed run for some seconds does not keep others waiting."""
    owner = hold(tmp_path, 0, "fork")
    assert Lock(tmp_path).held()
    owner.kill()
    assert not Lock(tmp_path).held()


def test_the_slot_that_a_sweep_gave_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_BOOTH_SLOT", "gpu:3")
    lock = Lock(tmp_path)
    assert lock.take()
    assert lock.owner().split()[2] == "gpu:3"
    lock.release()


def test_a_folder_has_locks_of_several_names(tmp_path: Path, hold: type[Holder]) -> None:
    assert hold(tmp_path).took
    other = Lock(tmp_path, "reserved")
    assert other.take("gpu:1")
    other.release()
    assert other.owner().split()[2] == "gpu:1"
    assert Lock(tmp_path).held()


# ---- files -------------------------------------------------------------------------------------------------


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    write_text(file, "first")
    with pytest.raises(RuntimeError), replacing(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "first"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = DiskLog(monkeypatch)
    file = tmp_path / "file.txt"
    write_text(file, "all of it")
    assert log == [("sync", partial_of(file)), ("name", file), ("sync", tmp_path)]


def test_what_killed_processes_left_half_written_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours, elsewhere = (
        partial_of(tmp_path / "run.yaml"),
        tmp_path / f"run.yaml.{gone.pid}@another-machine.part",
    )
    left = tmp_path / f"run.yaml.{gone.pid}@{socket.gethostname()}.part"
    folder = tmp_path / f"p1.{gone.pid}@{socket.gethostname()}.part"
    folder.mkdir()
    (folder / "events").touch()
    for file in (ours, elsewhere, left, tmp_path / "latest.json.part"):
        file.touch()
    remove_partials(tmp_path)
    assert set(tmp_path.iterdir()) == {ours, elsewhere}


def test_a_folder_s_new_owner_does_not_disturb_who_writes_into_it(tmp_path: Path) -> None:
    """A sweep writes a point's files without the lock, also while the point's run begins."""
    with replacing(tmp_path / "launch.json") as partial:
        partial.write_text("whole")
        with owning(tmp_path, Alone()):
            pass
    assert (tmp_path / "launch.json").read_text() == "whole"


class Alone(Ranks):
    """One rank without a process group."""

    def __init__(self) -> None:
        super().__init__(0, 1, torch.device("cpu"))

    def broadcast(self, value: T) -> T:
        return value


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    file.write_text('{"a": {"b": 1}}\n{"a": {"b": 1}')
    assert read_lines(file) == [{"a": {"b": 1}}]
