"""Validation while training changes no weights, resumes as training does, and is the same on any number of ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = "tests/cli/validated_steps.py"
ZERO = ("2", "3")
LONGER = ["--stages.coarse.steps", "6", "--sample.videos", "1"]
VALIDATED = ["--train.validate-every", "2", "--train.validate-examples", "3", "--train.validate-prompts", "1"]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path, validation: bool = True) -> list[dict[str, Any]]:
    """The lines of a run without what may differ: the seconds; with or without those of validations."""
    kept = [row for row in rows(folder) if validation or "validation" not in row]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in kept]


def validations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows(folder) if "validation" in row]


def equal(one: Path, two: Path) -> bool:
    ours, theirs = load_file(one), load_file(two)
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def validated(program: Any, tiny: list[str], train_all: list[str], tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("validated") / "run"
    ended = program.run(*tiny, *train_all, *LONGER, *VALIDATED, "--out", str(folder))
    assert ended.code == 0, ended.output
    return Path(folder)


def test_a_validated_run_ends_with_the_same_weights(
    program: Any, tiny: list[str], train_all: list[str], validated: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "run"
    ended = program.run(*tiny, *train_all, *LONGER, "--out", str(plain))
    assert ended.code == 0, ended.output
    for name in ("weights.safetensors", "strategy.safetensors", "checkpoints/0_coarse/weights.safetensors"):
        assert equal(plain / name, validated / name), name
    assert numbers(plain) == numbers(validated, validation=False)
    lines = validations(validated)
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("coarse", 2), ("coarse", 4), ("coarse", 6), ("fine", 2)
    ]  # fmt: skip
    assert len({line["validation"]["loss"] for line in lines}) == len(lines), "the network moves"
    assert all({"loss_0.0-0.2", "palette", "own_i"} < set(line["validation"]) for line in lines)
    cost = json.loads((validated / "cost.json").read_text())
    assert cost["validation_seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert [stage["steps"] for stage in cost["stages"]] == [6, 2]


def test_a_killed_run_resumes_with_the_validations_of_an_unbroken_one(
    program: Any, tiny: list[str], train_all: list[str], validated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [*tiny, *train_all, *LONGER, *VALIDATED, "--train.checkpoint-every", "3", "--out", str(folder)]
    # Six lines: steps 1 to 4 and two validations, the second after the checkpoint.
    ended = program.cut(*command, folder=folder, steps=6, number=signal.SIGKILL)
    assert ended.code == -signal.SIGKILL, ended.output
    kept = [line for line in rows(folder) if line["step"] <= 3]
    assert len(rows(folder)) > len(kept) == 4
    ended = program.run(*command)
    assert ended.code == 0, ended.output
    assert "stage coarse goes on after step 3\n" in ended.output
    assert rows(folder)[:4] == kept, "no validation is computed again"
    assert numbers(folder) == numbers(validated)
    assert equal(folder / "weights.safetensors", validated / "weights.safetensors")


@pytest.fixture(scope="module")
def trained(program: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, in one process without ZeRO, and on two ranks at ZeRO stages 2 and 3.

    To averages and validations stage 1 is as stage 2: whole parameters, and a part of the optimizer's state.
    """
    out = ["--out", str(tmp_path_factory.mktemp("zero"))]
    alone = program.python(SCRIPT, "--zero", "0", "--cases", "plain", "validated", *out)
    for ended in (alone, *program.two_ranks("--zero", *ZERO, *out, program=SCRIPT)):
        assert ended.code == 0, ended.output
    return Path(out[-1])


@pytest.mark.parametrize("zero", ZERO)
def test_two_ranks_measure_what_one_does_and_train_as_if_they_did_not(trained: Path, zero: str) -> None:
    alone, plain, ours = (
        trained / name for name in ("validated-1-zero0", f"plain-2-zero{zero}", f"validated-2-zero{zero}")
    )
    assert equal(plain / "stage" / "weights.safetensors", ours / "stage" / "weights.safetensors")
    one, two = validations(alone), validations(ours)
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2]
    for first, second in zip(one, two, strict=True):
        assert first["validation"] == pytest.approx(second["validation"], rel=1e-3)
    assert one[0]["validation"]["loss"] != pytest.approx(one[1]["validation"]["loss"], rel=1e-2)


@pytest.mark.parametrize("zero", ZERO)
def test_a_stage_ends_with_the_averages_at_every_zero_stage(trained: Path, zero: str) -> None:
    averaged, last, alone = (
        load_file(trained / name / "stage" / "weights.safetensors")
        for name in (f"plain-2-zero{zero}", f"unaveraged-2-zero{zero}", "plain-1-zero0")
    )
    moved = [name for name in last if not torch.equal(averaged[name], last[name])]
    assert "backbone.final_layer.linear.weight" in moved
    apart = [float((averaged[name] - last[name]).abs().median()) for name in moved]
    wrong = [float((averaged[name] - alone[name]).abs().median()) for name in moved]
    assert sum(wrong) < 0.1 * sum(apart)
