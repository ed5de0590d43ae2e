"""``experiments/gpu_session.sh`` with a stub of a sweep: a slice is packed so that another machine can go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
# `python experiments/sweep.py FILE ...`: leave files and the exit code of FILE; `python -c ...` is Python's.
[ "$1" = -c ] && exec PYTHON "$@"
echo "$@" >>"$ROOT/calls"
stage=s/stages/coarse-1 done=s/stages/coarse-0
mkdir -p "$ROOT/s/points/p" "$ROOT/$stage/step2" "$ROOT/$done"
row() { echo '{"status": "'$1'", "stages": [{"name": "coarse", "address": "'$2'"}]}'; }
[ -e "$ROOT/s/sweep.jsonl" ] || { row finished 0; row waiting 1; row failed 2; } >"$ROOT/s/sweep.jsonl"
for file in s/points/p/{cost.json,weights.safetensors} $stage/{step2/shard,a.part} $done/weights.safetensors
do [ -e "$ROOT/$file" ] || echo "$(wc -l <"$ROOT/calls")" >"$ROOT/$file"; done
exit "$(cat "$2")"
"""


@pytest.fixture
def session(tmp_path: Path):
    stub = tmp_path / "python"
    stub.write_text(STUB.replace("PYTHON", sys.executable))
    stub.chmod(0o755)

    def run(*codes: int, root: str = "here", **env: str) -> tuple[int, Path, list[str]]:
        files = []
        for number, code in enumerate(codes):
            files.append(tmp_path / f"{number}.yaml")
            files[-1].write_text(str(code))
        out = tmp_path / f"out-{root}"
        own = {"ROOT": str(tmp_path / root), "OUT": str(out), "PYTHON": str(stub), **env}
        ended = subprocess.run(
            ["bash", "experiments/gpu_session.sh", *map(str, files)], cwd=ROOT, env={**os.environ, **own}
        )
        calls = tmp_path / root / "calls"
        return ended.returncode, out, calls.read_text().splitlines() if calls.exists() else []

    return run


def packed(out: Path, pattern: str) -> set[str]:
    data = b"".join(file.read_bytes() for file in sorted(out.glob(pattern)))
    listed = (
        subprocess.run(["tar", "tz"], input=data, capture_output=True, check=True).stdout.decode().split()
    )
    return {name.removeprefix("./") for name in listed if not name.endswith("/")}


def test_what_is_cut_short_is_packed_to_go_on(session) -> None:
    code, out, calls = session(0, 130, SLICE="100", OVERRIDE="big.yaml", PART="100")
    assert code == 3
    assert len(calls) == 2
    assert all("--override big.yaml --seconds" in call and "--grace 20" in call for call in calls)
    assert packed(out, "results.tar.gz") == {"calls", "s/sweep.jsonl", "s/points/p/cost.json"}
    assert packed(out, "state.tar.gz.*") == {"s/stages/coarse-1/step2/shard"}, (
        "of the unfinished points alone"
    )
    assert len(list(out.glob("state.tar.gz.*"))) > 1, "no file is larger than PART"


def test_another_machine_goes_on_from_what_was_packed(session, tmp_path: Path) -> None:
    _, out, _ = session(130)
    fresh = tmp_path / "there" / "s"
    (fresh / "points" / "p").mkdir(parents=True)
    (fresh / "sweep.jsonl").write_text("newer")
    code, _, calls = session(0, root="there", FROM=str(out))
    assert (code, len(calls)) == (0, 2), "the first call came with the files"
    assert (fresh / "stages" / "coarse-1" / "step2" / "shard").read_text() == "1\n"
    assert (fresh / "points" / "p" / "weights.safetensors").read_text() == "2\n", "made anew"
    assert (fresh / "sweep.jsonl").read_text() == "newer"


def test_failures_and_time(session) -> None:
    assert session(1, 0)[0] == 0, "a point that failed does not stop the rest"
    assert session(2, 0, root="wrong")[0] == 2, "a wrong description does"
    code, _, calls = session(0, root="late", SLICE="10")
    assert (code, calls) == (3, [])
