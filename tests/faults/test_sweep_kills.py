"""A sweep that is killed at random moments ends in the table of one that was not. Ten minutes: ``make test-faults``."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeping import Sweep, Watch, describe, is_rank

pytestmark = [pytest.mark.slow, pytest.mark.kills]
KILLS, SEED = 20, 0
STUDY = {"launcher": "deepspeed", "ranks": 2}
LONGER = {
    "stages": {"coarse": {"steps": 40, "train": ["backbone.*", "strategy.*"]}, "fine": {"steps": 20}},
    "train": {"batch_size": 2, "checkpoint_every": 2},
}
READ_HALF = (
    "JSONDecodeError",
    "cut off",
    "cannot be read",
    "another architecture",
    "SafetensorError",
    "EOFError",
    "UnpicklingError",
    "PytorchStreamReader",
)
"""What a run says that has read a file that is not whole. Of files that are gone, only the sweep's own count: a killed
process takes its sockets and shared memory along, and those beside it may say so."""


def everything(command: str) -> bool:
    return True


def sweep_only(command: str) -> bool:
    return "experiments/sweep.py" in command


def local_launcher(command: str) -> bool:
    """DeepSpeed's own parent of the ranks: without it its front end exits with 0 and the ranks live on."""
    return "deepspeed.launcher.launch" in command


KINDS: dict[str, Callable[[str], bool]] = {
    "the whole group": everything,
    "one rank": is_rank,
    "the sweep": sweep_only,
    "the launcher": local_launcher,
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    sweep, begin = Sweep(describe(folder, LONGER, **STUDY), folder / "out"), time.monotonic()
    code, output = sweep.run()
    assert code == 0, output
    return sweep, time.monotonic() - begin


def test_twenty_kills_at_random_moments(undisturbed: tuple[Sweep, float], tmp_path: Path) -> None:
    expected, duration = undisturbed
    draw, kills, rounds = random.Random(SEED), 0, 0
    while kills < KILLS:  # a sweep that has got to its end before it was killed often enough: another one
        rounds += 1
        assert rounds <= KILLS, f"{kills} kills in {KILLS} sweeps: they end before they are killed"
        folder = tmp_path / f"round{rounds}"
        sweep = Sweep(describe(folder, LONGER, **STUDY), folder / "out")
        watch = Watch(sweep.out)
        watch.start()
        kills += disturb(sweep, draw, duration, KILLS - kills)
        assert watch.end() == []
        assert sweep.table() == expected.table()
        assert sweep.stage_steps() == expected.stage_steps(), "each step of every stage once"
        for log in sweep.out.glob("points/*/launch.log"):
            gone = f"No such file or directory: '{sweep.out}"
            found = [words for words in (*READ_HALF, gone) if words in log.read_text()]
            assert not found, f"{log}: {found}"
        assert not sweep.left()
        print(f"round {rounds}: {kills} kills so far")  # noqa: T201
    assert kills == KILLS


def disturb(sweep: Sweep, draw: random.Random, duration: float, limit: int) -> int:
    """Run a sweep to its end, killing parts of it on the way, at most `limit` times; how often."""
    kills, output = 0, ""
    for _ in range(
        limit + 2
    ):  # as often as each kill ends it and once more; what still fails, fails by itself
        process = sweep.start("--retries", "2", "--grace", "20")
        moment = time.monotonic() + draw.uniform(0, duration / 2)
        while process.poll() is None:
            if kills < limit and time.monotonic() > moment:
                kind = draw.choice(list(KINDS))
                commands = sweep.processes().values()
                targets = [command for command in commands if KINDS[kind](command)]
                if not targets:
                    time.sleep(0.5)  # nothing of that kind just now
                    continue
                one = draw.choice(targets) if kind == "one rank" else None
                killed = sweep.kill(
                    lambda command, one=one, kind=kind: command == one if one else KINDS[kind](command)
                )
                kills += bool(killed)
                moment = time.monotonic() + draw.uniform(0, duration / 2)
            time.sleep(0.05)
        output, _ = process.communicate()
        if process.returncode == 0:
            return kills
    raise AssertionError(f"the sweep does not get to its end:\n{output}")
