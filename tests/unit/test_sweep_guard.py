"""A sweep's folder: another sweep is refused, the same one shares it, a changed one goes on once it is free."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_booth.commands.sweep import main
from dit_booth.study.folder import shared_folder
from dit_booth.study.plan import Point, SweepPlan

ROOT = Path(__file__).parents[2]
HOLD = """
import pickle, sys
from pathlib import Path
from dit_booth.study.folder import shared_folder
with shared_folder(pickle.loads(bytes.fromhex(sys.argv[1]))):
    print("in", flush=True)
    sys.stdin.read()
"""


def plan_of(folder: Path, *points: str) -> SweepPlan:
    made = [
        Point(id=p, label=p, group=p, seed=0, baseline=False, options={}, stages=(), settings={})
        for p in points
    ]
    return SweepPlan(
        name="s", folder=folder, store=folder / "stages", launcher="python", ranks=1, points=tuple(made)
    )


@contextmanager
def held(plan: SweepPlan) -> Iterator[subprocess.Popen[str]]:
    """Another process runs a plan."""
    import pickle

    command = [sys.executable, "-c", HOLD, pickle.dumps(plan).hex()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_same_points_are_shared_and_others_wait(tmp_path: Path) -> None:
    ours = plan_of(tmp_path, "a", "b")
    more = plan_of(tmp_path, "a", "b", "c")
    with held(ours) as first, held(ours):
        for other in (more, replace(ours, store=tmp_path / "elsewhere")):
            says = f"run with other points .begun by process {first.pid} on"
            with pytest.raises(ValueError, match=says), shared_folder(other):
                pass
        with shared_folder(replace(ours, points=ours.points[::-1])):
            pass
    with (
        shared_folder(more),
        pytest.raises(AssertionError),
        held(ours),
    ):  # those have ended, and now these points run
        pass


def described(folder: Path, name: str, **changes: Any) -> list[str]:
    file = folder / f"{name}.yaml"
    base = str(ROOT / "experiments/configs/demo.yaml")
    file.write_text(yaml.safe_dump({"base": base, "seeds": [0], "launcher": "python", **changes}))
    return [str(file), "--out", str(folder / "out"), "--emit", "shell"]


def test_another_sweep_s_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(described(tmp_path, "one")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    for more in ([], ["--dry-run"]):
        assert main([*described(tmp_path, "two"), *more]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "out holds the sweep 'one', and this one is 'two'; choose another --out" in said
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert main(described(tmp_path, "one", seeds=[0, 1])) == 0, "the same sweep with a seed more goes on"
    assert capsys.readouterr().out.count("\npoint_") == 2
