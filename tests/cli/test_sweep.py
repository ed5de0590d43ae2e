"""A real, tiny sweep: one coarse stage for two fine points; what happens the second time, and after kills."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sweeping import STUDY, Sweep, Watch, describe, is_rank
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dit_booth.files import read_lines
from dit_booth.report.read import read_study
from dit_booth.report.table import make_table
from dit_booth.study.description import read_description
from dit_booth.study.plan import plan_sweep
from dit_booth.study.rows import ALL_COSTS
from dit_booth.study.show import show_plan
from experiments.bench import sweep_cost

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep, run without disturbance."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = Sweep(describe(folder), folder / "out")
    code, output = sweep.run()
    assert code == 0, output
    return sweep


def test_the_shared_stage_is_trained_once(swept: Sweep):
    first, second = swept.rows()
    assert [row["status"] for row in (first, second)] == ["finished", "finished"]
    assert first["stages"][0] == second["stages"][0] and first["stages"][0]["shared"]
    assert first["stages"][1]["address"] != second["stages"][1]["address"]
    assert sorted(map(len, swept.stage_steps().values())) == [4, 4, 6]
    assert sum("coarse:" in read(swept, row) for row in (first, second)) == 1, "one progress bar"


def test_the_bench_of_a_sweep_s_cost_adds_it_up(swept: Sweep):
    rows = swept.rows()
    found = sweep_cost.costs(rows, 100.0)
    first, second = rows
    coarse, fine = first["stages"][0]["seconds"], [row["stages"][1]["seconds"] for row in rows]
    assert (found["coarse_seconds"], found["fine_seconds"]) == (coarse, fine), "the shared stage once"
    assert found["stage_seconds"] == pytest.approx(coarse + sum(fine))
    assert found["overhead"] == pytest.approx(100 / (coarse + sum(fine)) - 1)
    assert found["overhead"] == pytest.approx(found["overhead_sampling"] + found["overhead_rest"])
    assert found["sample_seconds"] == [first["sample_seconds"], second["sample_seconds"]]
    assert 0 < first["sample_seconds"] < first["wall_seconds"]
    assert (found["naive_seconds"], found["naive_is"]) == (100 + coarse, "computed")
    assert sweep_cost.costs(rows, 100.0, 150.0)["saved"] == pytest.approx(1 / 3)
    assert "| overhead |" in sweep_cost.page({**found, **dict.fromkeys(CONDITIONS, "x")}, "COMMAND")


CONDITIONS = ("steps", "batch", "videos", "launcher", "device", "torch", "threads", "load")


def read(sweep: Sweep, row: dict) -> str:
    return (sweep.out / row["run"] / "launch.log").read_text()


def test_every_point_is_a_run_with_all_its_lines(swept: Sweep):
    for row in swept.rows():
        folder = swept.out / row["run"]
        lines = [(x["stage"], x["step"]) for x in read_lines(folder / "metrics.jsonl") if "step" in x]
        assert lines == [("coarse", n) for n in range(1, 7)] + [("fine", n) for n in range(1, 5)]
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        assert [event.step for event in events.Scalars("coarse/loss")] == list(range(1, 7))
        assert (folder / "samples" / "000-seed0.mp4").is_file()


def test_a_row_has_options_scores_and_costs(swept: Sweep):
    first, second = swept.rows()
    assert first["options"] == {"kv_concat.update": "first_frame_value"}
    assert (first["baseline"], second["baseline"], first["seed"]) == (True, False, 0)
    assert first["metrics"]["psnr"]["n"] == 2
    stages = load_file(swept.out / "stages" / stage_name(first, 0) / "weights.safetensors")
    fine = load_file(swept.out / "stages" / stage_name(first, 1) / "weights.safetensors")
    assert first["trained_parameters"] == sum(value.numel() for value in {**stages, **fine}.values())
    assert first["train_seconds"] == pytest.approx(sum(stage["seconds"] for stage in first["stages"]))
    for name in ALL_COSTS:
        assert first[name] > 0, name
    assert first["launch_seconds"] < first["wall_seconds"] + 60


def stage_name(row: dict, number: int) -> str:
    return f"{row['stages'][number]['name']}-{row['stages'][number]['address']}"


def test_flops_are_those_of_the_step(swept: Sweep):
    """The matrix products of one linear layer by hand: forward, and backward to its weight; the base is frozen."""
    row = swept.rows()[0]
    cost = json.loads((swept.out / "stages" / stage_name(row, 1) / "cost.json").read_text())
    tokens = 3 * 4  # 3 frames of 2 x 2 tokens
    layer = 2 * tokens * 128 * 128  # of to_k_new in one block
    assert cost["flops_per_step"] > 2 * 5 * (4 * layer) * 2, "two videos, five blocks, four projections"
    assert cost["flops_per_step"] < 1e12


def test_a_point_equals_the_run_that_trains_all_by_itself(swept: Sweep, program, tmp_path: Path):
    """Bit for bit: the coarse stage does not know which fine stage follows, nor the store."""
    row = swept.rows()[1]
    config = swept.out / row["run"] / "run.yaml"
    ended = program.run("--config", str(config), "--store", "", "--out", str(tmp_path))
    assert ended.code == 0, ended.output
    for name in ("strategy.safetensors", "weights.safetensors"):
        ours, theirs = load_file(tmp_path / name), load_file(swept.out / row["run"] / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_lines(tmp_path / "metrics.jsonl")[-1] == read_lines(config.parent / "metrics.jsonl")[-1]


def test_the_second_time_nothing_is_done(swept: Sweep):
    before = {path: path.stat().st_mtime_ns for path in swept.out.rglob("*")}
    start = time.monotonic()
    code, output = swept.run()
    assert (code, time.monotonic() - start < 5) == (0, True), output
    assert "all points are finished, nothing to do" in output
    assert {path: path.stat().st_mtime_ns for path in swept.out.rglob("*")} == before


def test_a_changed_option_reruns_what_depends_on_it(swept: Sweep, tmp_path: Path):
    def left(name: str, **changes: Any) -> str:
        description = read_description(describe(tmp_path / name, **changes))
        plan = plan_sweep(description, tmp_path / name, swept.out / "stages")
        return next(line for line in show_plan(plan).splitlines() if line.startswith("steps to train"))

    assert left("as it was") == "steps to train: 0 of 14; with no stage shared there would be 20"
    assert (
        left("one seed more", seeds=[0, 1])
        == "steps to train: 14 of 28; with no stage shared there would be 40"
    )
    assert left("the fine stage", options={"stages.fine.lr": 1e-3}).startswith("steps to train: 8 of 14")
    assert left("sampling only", options={"guidance.scale": 3}).startswith("steps to train: 0 of 14")


def test_hparams_hold_every_option_score_and_cost_of_a_row(swept: Sweep):
    for row in swept.rows():
        events = EventAccumulator(str(swept.out / "tensorboard" / row["point"]))
        events.Reload()
        expected = {f"scores/{name}": score["mean"] for name, score in row["metrics"].items()}
        expected |= {f"costs/{name}": row[name] for name in ALL_COSTS}
        told = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        assert told == pytest.approx(expected, rel=1e-6, nan_ok=True)
        content = {
            tag: HParamsPluginData.FromString(data)
            for tag, data in events.PluginTagToContent("hparams").items()
        }
        start = content["_hparams_/session_start_info"].session_start_info.hparams
        assert start["kv_concat.update"].string_value == row["options"]["kv_concat.update"]
        assert start["seed"].number_value == row["seed"]
        columns = content["_hparams_/experiment"].experiment.metric_infos
        assert {column.name.tag for column in columns} == set(expected)


def test_the_report_reads_it(swept: Sweep):
    study = read_study([swept.out])
    assert [group.baseline for group in study.groups] == [True, False]
    table = make_table(study)
    baseline, other = table.rows
    assert (baseline.prompts, other.prompts, set(other.differences)) == ("2", "2", set(baseline.quality))
    assert [row.control for row in table.controls] == ["truth", "shuffled", "none"]
    assert {control for control, _ in study.points[1].samples.measured} == {"", "truth"}


def test_two_kills_end_in_the_same_table(swept: Sweep, tmp_path: Path):
    """First the ranks are killed, and the sweep tries again; then every process of it is. (More: make test-faults.)"""
    sweep = Sweep(describe(tmp_path), tmp_path / "out")
    watch = Watch(sweep.out)
    watch.start()
    process = sweep.start()
    wait(process, lambda: any(len(steps) >= 3 for steps in sweep.stage_steps().values()))
    assert sweep.kill(is_rank)
    wait(process, lambda: any(sweep.out.glob("stages/fine-*/metrics.jsonl")))
    assert sweep.kill(lambda command: True)
    process.wait()
    code, output = sweep.run()
    assert code == 0, output
    assert watch.end() == []
    assert sweep.table() == swept.table()
    assert sweep.stage_steps() == swept.stage_steps(), "each step once"
    assert not sweep.left()


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    limit = time.monotonic() + 300
    while not until():
        assert time.monotonic() < limit and process.poll() is None, "it does not come"
        time.sleep(0.02)


def test_a_typo_is_an_error_before_anything_starts(program, tmp_path: Path):
    file = describe(tmp_path, grid={"kv_concat.updat": ["direct"]}, baseline=None)
    ended = program.python("experiments/sweep.py", str(file), "--out", str(tmp_path / "out"))
    assert ended.code == 2
    assert ended.output.count("\n") == 1
    assert "option 'kv_concat.updat' is unknown" in ended.output
    assert "nearest: kv_concat.update" in ended.output
    assert not (tmp_path / "out").exists()
    assert STUDY["launcher"] == "python"
