"""The comparison of two checkouts' trainings, on tiny files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from experiments.bench import same_as
from experiments.bench.same_as import Case, Checkout, ComparisonConfig

STEP = {
    "stage": "fine",
    "step": 1,
    "loss": 0.1,
    "aux_loss": 0.0,
    "lr": 1e-4,
    "grad_norm": 2.0,
    "seconds": 0.5,
}
TENSORS = {"strategy.a": torch.tensor([1.0, 2.0]), "backbone.b": torch.tensor([3.0])}


def write_run(folder: Path, *steps: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True)
    lines = [*(STEP | step for step in steps or ({},)), {"samples": {}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = tensors or TENSORS
    for file in same_as.WEIGHTS:
        prefix = "strategy." if file.startswith("strategy") else "backbone."
        save_file({name: x for name, x in tensors.items() if name.startswith(prefix)}, folder / file)
    return folder


def test_equal_runs_are_equal_whatever_their_seconds(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "1"), write_run(tmp_path / "2", {"seconds": 9.0})
    assert same_as.compare_steps(one, two) == same_as.Steps()
    assert same_as.compare_tensors(one, two) == same_as.Tensors()


def test_the_first_differing_step_is_told(tmp_path: Path) -> None:
    one = write_run(tmp_path / "1", {}, {"step": 2}, {"step": 3})
    two = write_run(
        tmp_path / "2", {}, {"step": 2, "grad_norm": 2.0000000000000004}, {"step": 3, "loss": 0.25}
    )
    steps = same_as.compare_steps(one, two)
    assert steps.first == "fine step 2: grad_norm 2.0 here, 2.0000000000000004 there"
    assert steps.largest == pytest.approx(0.15)


def test_nan_equals_nan_only(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, {"grad_norm": float("nan")}) for name in "12")
    assert not same_as.compare_steps(one, two).first
    assert "nan here, 2.0 there" in same_as.compare_steps(one, write_run(tmp_path / "3")).first


def test_a_missing_step_or_value_differs(tmp_path: Path) -> None:
    one = write_run(tmp_path / "1", {}, {"step": 2})
    assert same_as.compare_steps(one, write_run(tmp_path / "2")).first == "fine step 2 only here"
    short = tmp_path / "2" / "metrics.jsonl"
    lines = [STEP, {**STEP, "step": 2}]
    short.write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "loss"}) + "\n" for line in lines)
    )
    assert same_as.compare_steps(one, tmp_path / "2").first == "fine step 1: loss is missing there"


def test_an_older_name_of_the_auxiliary_loss_is_known(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "1", {"aux_loss": 0.5}), write_run(tmp_path / "2", {"aux_loss": 0.5})
    text = (two / "metrics.jsonl").read_text().replace("aux_loss", "penalty")
    (two / "metrics.jsonl").write_text(text)
    assert not same_as.compare_steps(one, two).first
    (two / "metrics.jsonl").write_text(text.replace('"penalty": 0.5', '"penalty": 0.25'))
    assert same_as.compare_steps(one, two).first == "fine step 1: aux_loss 0.5 here, 0.25 there"


def test_one_changed_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    changed = TENSORS["backbone.b"].nextafter(torch.tensor(4.0))
    one = write_run(tmp_path / "1")
    two = write_run(tmp_path / "2", tensors={**TENSORS, "backbone.b": changed})
    tensors = same_as.compare_tensors(one, two)
    assert tensors.differing == ("backbone.b",)
    assert 0 < tensors.largest < 1e-6


def test_names_dtypes_and_shapes_must_agree(tmp_path: Path) -> None:
    one = write_run(tmp_path / "1")
    other = {"strategy.a": torch.ones(2, 1), "backbone.c": torch.tensor([3.0])}
    tensors = same_as.compare_tensors(one, write_run(tmp_path / "2", tensors=other))
    assert tensors.differing == (
        "strategy.a (torch.float32 [2] here, torch.float32 [2, 1] there)",
        "backbone.b (only here)",
        "backbone.c (only there)",
    )


def test_the_matrix_has_every_backbone_strategy_and_engine() -> None:
    names = [case.name for case in same_as.select_cases([])]
    assert len(names) == len(set(names)) == 30
    assert [case.name for case in same_as.select_cases(["unet-bank-zero3"])] == ["unet-bank-zero3"]
    with pytest.raises(ValueError, match="only is 'kv'"):
        same_as.select_cases(["kv"])


def test_every_case_is_a_run_that_parses() -> None:
    from dit_booth.config.parse import parse

    for case in same_as.select_cases([]):
        config = parse(case.flags())
        assert Path(config.ds_config).is_file()
        assert (config.backbone, config.stages.fine.steps) == (case.backbone, 20)


def test_flags_are_spelled_as_the_other_checkout_has_them() -> None:
    flags = ["--data.size", "12", "--train.clip", "1.0"]
    assert same_as.rename(flags, ["data.size=data.side"]) == ["--data.side", "12", "--train.clip", "1.0"]
    assert same_as.rename(flags, []) == flags


def fake_checkout(root: Path, program: str, state: str = "0") -> Checkout:
    (root / "experiments").mkdir(parents=True, exist_ok=True)
    (root / "experiments" / "run.py").write_text(program)
    return Checkout(root, Path(sys.executable), state)


RUNS = """
import pathlib, sys
folder = pathlib.Path(sys.argv[-1])
count = folder.parent / "count"
count.write_text(str(int(count.read_text()) + 1 if count.is_file() else 1))
(folder / "finished").write_text("")
"""


def test_a_finished_training_is_not_run_again_unless_something_changed(tmp_path: Path) -> None:
    checkout, folder = fake_checkout(tmp_path / "checkout", RUNS), tmp_path / "out" / "here"

    def count(checkout: Checkout, *flags: str, again: bool = False) -> int:
        assert same_as.train(checkout, flags, folder, ranks=1, again=again) == ""
        return int((folder.parent / "count").read_text())

    assert [count(checkout), count(checkout)] == [1, 1]
    assert count(checkout, again=True) == 2
    assert count(checkout, "--train.seed", "1") == 3
    assert count(fake_checkout(checkout.root, RUNS, state="1"), "--train.seed", "1") == 4


def test_a_failed_training_fails_its_case(tmp_path: Path) -> None:
    checkout = fake_checkout(tmp_path / "checkout", "import sys; sys.exit('error: train.clip is 0')")
    config = ComparisonConfig(other=checkout.root, out=tmp_path / "out")
    result = same_as.run_case(Case("dit", "bank", "one"), checkout, checkout, config)
    assert not result.equal
    assert "exit code 1: error: train.clip is 0" in str(result)


@pytest.mark.parametrize("equal", [True, False])
def test_the_exit_code_and_the_results_tell_whether_all_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool
) -> None:
    def train(checkout: Checkout, flags: list[str], folder: Path, **options: Any) -> str:
        write_run(
            folder, {} if equal else {"loss": float(len(folder.name))}
        )  # "here" and "there" differ in length
        return ""

    monkeypatch.setattr(same_as, "train", train)
    monkeypatch.setattr(
        same_as, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), equal=torch.equal)
    )
    monkeypatch.setattr(same_as.Checkout, "at", lambda root, python: Checkout(root, python, "0"))
    config = ComparisonConfig(other=tmp_path, only=("dit-bank-one",), out=tmp_path / "out")
    assert same_as.main(config) == (0 if equal else 1)
    (row,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert (row["case"], row["equal"]) == ("dit-bank-one", equal)


def test_an_interpreter_with_another_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --python of its environment"):
        Checkout.at(tmp_path, Path(sys.executable))
