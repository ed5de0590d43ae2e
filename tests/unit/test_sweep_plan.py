"""A sweep's plan: points checked by the run's own parser, shared stages, what is kept of a plan, job lists."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_booth.data import listing
from dit_booth.study import plan as planning
from dit_booth.study.description import Description, read_description
from dit_booth.study.emit import emit, jobs_of
from dit_booth.study.plan import SweepPlan, expand, plan_sweep
from dit_booth.study.rows import FAILED, row_of, status_of, write_rows
from dit_booth.study.show import show_plan, show_rows

ROOT = Path(__file__).parents[2]
STUDY = {
    "base": str(ROOT / "experiments/configs/demo.yaml"),
    "options": {"stages.coarse.steps": 40, "stages.fine.steps": 20, "dit.depth": 1, "weights": "none"},
    "grid": {"kv_concat.update": ["first_frame_value", "direct"], "stages.fine.lr": [1e-4, 1e-3]},
    "seeds": [0, 1],
    "baseline": {"kv_concat.update": "first_frame_value", "stages.fine.lr": 1e-3},
}


def described(folder: Path, **changes: Any) -> Description:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return read_description(file)


def planned(folder: Path, **changes: Any) -> SweepPlan:
    return plan_sweep(described(folder, **changes), folder / "sweep", folder / "sweep" / "stages")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    return planned(tmp_path_factory.mktemp("study"))


def placed(study: SweepPlan, folder: Path) -> SweepPlan:
    """The same plan in a folder of its own."""
    return replace(study, folder=folder, store=folder / "stages")


# ---- points and stages -------------------------------------------------------------------------------------


def test_fine_points_share_one_coarse_stage_for_each_seed(study: SweepPlan) -> None:
    assert len(study.points) == 8
    uses = study.uses()
    assert sorted(uses.values()) == [1] * 8 + [4, 4]
    for seed in (0, 1):
        assert len({p.stages[0].key for p in study.points if p.seed == seed}) == 1


def test_points_of_one_group_differ_in_the_seed_only(study: SweepPlan) -> None:
    groups: dict[str, list[int]] = {}
    for point in study.points:
        groups.setdefault(point.group, []).append(point.seed)
    assert list(groups.values()) == [[0, 1]] * 4
    assert len({point.id for point in study.points}) == 8
    point = study.points[3]
    assert point.options == {"kv_concat.update": "first_frame_value", "stages.fine.lr": 1e-3}
    assert (point.settings["train"]["seed"], point.settings["sample"]["seeds"]) == (1, [0])
    assert [(p.label, p.seed) for p in study.points if p.baseline] == [
        ("update=first_frame_value, lr=0.001", 0), ("update=first_frame_value, lr=0.001", 1)
    ]  # fmt: skip


def references(plan: SweepPlan) -> dict[str, Any]:
    return {point.label: point.settings["sample"]["references"] for point in plan.points}


def test_floors_are_sampled_with_the_baseline_s_points_alone(study: SweepPlan, tmp_path: Path) -> None:
    own, floors = ["own"], ["own", "shuffled", "none"]
    assert references(study) == {
        "update=first_frame_value, lr=0.0001": own, "update=first_frame_value, lr=0.001": floors,
        "update=direct, lr=0.0001": own, "update=direct, lr=0.001": own,
    }  # fmt: skip
    changes: dict[str, Any] = {"grid": {"kv_concat.update": ["first_frame_value", "direct"]}, "seeds": [0]}
    one = planned(tmp_path, **changes, baseline="update=direct", controls=["none"], noise_seeds=[3, 4])
    assert references(one) == {"update=first_frame_value": own, "update=direct": ["own", "none"]}
    assert {tuple(point.settings["sample"]["seeds"]) for point in one.points} == {(3, 4)}
    assert references(planned(tmp_path, **changes, baseline=None)) == {
        "update=first_frame_value": floors, "update=direct": floors,
    }  # fmt: skip


def test_engines_are_an_axis_whose_stages_are_told_by_their_content(tmp_path: Path) -> None:
    """ZeRO stage, offload and precision: none shares a stage with another, but with a copy of itself."""
    engines = ROOT / "experiments/configs/engines"
    files = [str(file) for file in sorted(engines.glob("*.json"))]
    (tmp_path / "copy.json").write_text((engines / "zero2.json").read_text())
    plan = planned(
        tmp_path, grid={"ds_config": [*files, str(tmp_path / "copy.json")]}, seeds=[0], baseline=None
    )
    assert len(files) == 6 and len({point.id for point in plan.points}) == 7
    assert len({point.stages for point in plan.points}) == 6
    same = {Path(p.options["ds_config"]).name for p in plan.points if plan.uses()[p.stages[0].key] > 1}
    assert same == {"copy.json", "zero2.json"}
    without = [{**point.settings, "ds_config": ""} for point in plan.points]
    assert without == without[:1] * 7, "they differ in nothing else"


def test_a_sampling_option_changes_the_point_and_no_stage(study: SweepPlan, tmp_path: Path) -> None:
    options = {**STUDY["options"], "guidance.scale": 5}
    other = planned(tmp_path, options=options, grid={}, seeds=[0], baseline=None).points[0]
    same = planned(tmp_path, grid={}, seeds=[0], baseline=None).points[0]
    assert other.id != same.id and other.group != same.group
    assert other.stages == same.stages


def test_options_of_strategies_that_a_point_lacks_are_left_out(tmp_path: Path) -> None:
    points = planned(tmp_path, list=[{"strategy": "none"}, {"strategy": "kv_concat"}], grid={}, baseline=None,
                     options={"kv_concat.update": "direct", "stages.fine.steps": 5}).points  # fmt: skip
    assert "kv_concat" not in points[0].settings
    assert points[-1].settings["kv_concat"]["update"] == "direct"
    assert points[0].stages == ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": {"stages.fine.lrr": [1]}}, r"option 'stages\.fine\.lrr' is unknown.*nearest: stages\.fine\.lr"),
        ({"options": {"train.sed": 1}}, r"option 'train\.sed' is unknown.*nearest: train\.seed"),
        ({"grid": {"strategy": ["none"], "kv_concat.update": ["direct"]}},
         r"'strategy=none, update=direct'.*option 'kv_concat\.update' is unknown to a run of 'none'"),
        ({"grid": {"strategy": ["kv_conct"]}}, r"strategy 'kv_conct' is unknown; nearest: kv_concat"),
        ({"grid": {"stages.fine.lr": ["fast"]}}, r"point 'lr=fast'.*lr.*fast"),
        ({"grid": {"stages.fine.lr": [-1]}}, r"lr is -1\.0; use a number in \(0, 1000\]"),
        ({"grid": {"schedule": [["coarse", "fin"]]}}, r"point 'schedule=coarse\+fin'.*fin"),
        ({"grid": {"schedule": [["coarse"]]}, "options": {"strategy": "none"},
          "baseline": None}, r"stage 'coarse' trains nothing"),
        ({"baseline": {"kv_concat.update": "direct"}}, r"is more than one of the points"),
        ({"options": {"sample.videos": 1}}, r"controls has shuffled, .* and sample\.videos is 1; raise it to 2"),
        ({"baseline": "nobody"}, r"baseline 'nobody' is none of the points \('update="),
        ({"grid": {"data.workers": [0, 1]}, "baseline": None}, r"'workers=0' and 'workers=1' are the same run"),
        ({"options": {"ds_config": "no.json"}}, r"ds_config is 'no\.json'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        expand(described(tmp_path, seeds=[0], **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


# ---- the kept plan -----------------------------------------------------------------------------------------


def test_a_plan_is_made_once(study: SweepPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(description: Description) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(planning, "expand", never)
    again = planned(study.folder.parent)
    assert again == study


@pytest.mark.parametrize("changed", ["base", "ds_config", "description"])
def test_a_plan_is_made_anew_when_what_it_came_from_changes(tmp_path: Path, changed: str) -> None:
    base, engine = tmp_path / "base.yaml", tmp_path / "ds.json"
    base.write_text(f"extends: {STUDY['base']}\nds_config: {engine}\n")
    engine.write_text("{}")
    changes: dict[str, Any] = {"base": str(base), "grid": {}, "baseline": None, "seeds": [0]}
    before = planned(tmp_path, **changes).points[0]
    if changed == "base":
        base.write_text(base.read_text() + "train: {clip: 3}\n")
    elif changed == "ds_config":
        engine.write_text('{"zero_optimization": {"stage": 1}}')
    else:
        changes["options"] = {"train.clip": 3}
    assert planned(tmp_path, **changes).points[0].stages != before.stages


def test_a_base_may_extend_a_packaged_configuration(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("extends: demo\n")
    one = planned(tmp_path, base=str(base), grid={}, baseline=None, seeds=[0]).points[0]
    base.write_text("extends: study\n")
    other = planned(tmp_path, base=str(base), grid={}, baseline=None, seeds=[0]).points[0]
    frames = [point.settings["stages"]["coarse"]["frames"] for point in (one, other)]
    assert frames == [3, 0], "those of the demo, then of the studies"


def test_a_kept_plan_sees_a_replaced_video(tmp_path: Path) -> None:
    video = tmp_path / "set" / "videos" / "page" / "1.mp4"
    video.parent.mkdir(parents=True)
    video.write_text("one")
    (tmp_path / "set" / "train.csv").write_text("videoid,page_dir,name\n1,page,a dog\n")
    options = {"data.kind": "triplets", "data.triplets.root": str(tmp_path / "set")}
    changes: dict[str, Any] = {"options": options, "grid": {}, "baseline": None, "seeds": [0]}
    before = planned(tmp_path, **changes).points[0]
    assert planned(tmp_path, **changes).points[0] == before
    video.write_text("another")
    listing._files_of.cache_clear()  # as in a new process
    after = planned(tmp_path, **changes).points[0]
    assert after.stages != before.stages and after.id != before.id


def test_a_kept_plan_needs_no_pytorch(study: SweepPlan) -> None:
    code = (
        "import sys; from pathlib import Path; from dit_booth.study.description import read_description;"
        "from dit_booth.study.plan import plan_sweep; from dit_booth.study.rows import write_rows;"
        "folder = Path(sys.argv[1]); plan = plan_sweep(read_description(folder / 'study.yaml'), folder / 'sweep',"
        "folder / 'sweep' / 'stages'); write_rows(plan); print(len(plan.points), 'torch' in sys.modules)"
    )
    start = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", code, str(study.folder.parent)], capture_output=True, text=True, cwd=ROOT
    )
    assert said.stdout.split() == ["8", "False"], said.stderr
    assert time.monotonic() - start < 5


# ---- what is there -----------------------------------------------------------------------------------------


def test_rows_are_a_function_of_the_points_files(study: SweepPlan, tmp_path: Path) -> None:
    plan = placed(study, tmp_path)
    first, second = plan.points[:2]
    folder = plan.run_folder(first)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"samples": {"psnr": {"mean": 3.0, "stderr": NaN, "n": 1}}}\n{"half'
    )
    cost = {
        "address": first.stages[1].address,
        "seconds": 4.0,
        "step_seconds": 0.2,
        "steps": 20,
        "flops_per_step": 5,
    }
    (folder / "cost.json").write_text(
        f'{{"trained_parameters": 7, "stages": [{str(cost).replace(chr(39), chr(34))}]}}'
    )
    assert row_of(plan, first, set())["metrics"] == {}, "not finished yet"
    (folder / "finished").write_text("")
    failed = plan.run_folder(second) / FAILED
    failed.parent.mkdir()
    failed.write_text('{"exit": 247, "error": ["error: no"]}')
    rows = write_rows(plan)
    assert [row["status"] for row in rows] == ["finished", "failed", *["waiting"] * 6]
    assert rows[0]["metrics"] == {"psnr": {"mean": 3.0, "stderr": None, "n": 1}}
    assert (rows[0]["trained_parameters"], rows[0]["step_seconds"]) == (7, None)
    assert [(s["name"], s["shared"], s["seconds"]) for s in rows[0]["stages"]] == [
        ("coarse", True, None), ("fine", False, 4.0)
    ]  # fmt: skip
    assert (rows[0]["train_seconds"], rows[0]["train_flops"]) == (None, None), (
        "nothing is known of the coarse stage"
    )
    assert rows[1]["error"] == ["error: no"]
    written = (plan.folder / "sweep.jsonl").stat()
    assert write_rows(plan) == rows
    assert (plan.folder / "sweep.jsonl").stat().st_mtime_ns == written.st_mtime_ns, (
        "equal rows are not written again"
    )
    said = show_rows(plan, rows)
    assert "error: no" in said and "3.000" in said
    assert "failed     (exit code 247: SIGKILL)\n" in said


def test_training_costs_are_those_of_all_stages_whoever_trained_them(
    study: SweepPlan, tmp_path: Path
) -> None:
    plan = placed(study, tmp_path)
    for wall, point in enumerate(plan.points[:2]):
        costs = [
            {"address": stage.address, "seconds": 4.0, "steps": stage.steps, "flops_per_step": 5.0}
            for stage in point.stages
        ]
        folder = plan.run_folder(point)
        folder.mkdir(parents=True)
        (folder / "cost.json").write_text(json.dumps({"wall_seconds": wall, "stages": costs}))
        (folder / "finished").write_text("")
    rows = write_rows(plan)
    steps = sum(stage.steps for stage in plan.points[0].stages)
    assert [(r["train_seconds"], r["train_flops"]) for r in rows[:3]] == [(8.0, 5.0 * steps)] * 2 + [
        (None, None)
    ]


def test_the_plan_says_what_is_shared_there_and_left(study: SweepPlan, tmp_path: Path) -> None:
    plan = placed(study, tmp_path)
    said = show_plan(plan)
    assert "steps to train: 240 of 240; with no stage shared there would be 480" in said
    assert "240 steps by their FLOPs" in said, "the estimate: test_sweep_estimate.py"
    assert said.count("shared by 4 points") == 2 and said.count("of one point") == 8
    coarse, fine = (plan.stage_folder(stage) for stage in plan.points[0].stages)
    for folder in (coarse, fine):
        folder.mkdir(parents=True)
    (coarse / "weights.safetensors").write_text("")
    (coarse / "cost.json").write_text('{"step_seconds": 0.5, "flops_per_step": 1e15}')
    (fine / "latest.json").write_text('{"tag": "step15"}')
    said = show_plan(plan)
    assert "steps to train: 185 of 240" in said
    assert "goes on at step 15" in said
    assert "40 steps by step times of finished stages" in said, "the coarse steps of the other seed"
    assert "about 0 min 20 s of training" in said, "all else is nothing at such a rate"
    assert "145 steps by their FLOPs" in said
    assert status_of(plan, plan.points[0]) == "waiting"


# ---- job lists ---------------------------------------------------------------------------------------------


def test_shared_stages_are_jobs_that_points_depend_on(study: SweepPlan, tmp_path: Path) -> None:
    plan = placed(study, tmp_path)
    jobs = {job.name: job for job in jobs_of(plan, "shell")}
    assert len(jobs) == 10
    for point in plan.points:
        stage = f"stage_coarse_{point.stages[0].address}"
        assert jobs[f"point_{point.id}"].after == (stage,)
        assert list(jobs).index(stage) < list(jobs).index(f"point_{point.id}")
        assert "--stop-after coarse" in jobs[stage].command
        settings = yaml.safe_load((plan.run_folder(point) / "run.yaml").read_text())
        assert settings["store"] == str(plan.store)
    assert len({job.command.split()[2] for job in jobs.values()}) == 10, "every job has a port of its own"
    assert all(" --num_gpus 1 " in job.command for job in jobs.values()), "and not all GPUs of the machine"
    for kind in ("slurm", "shell"):
        checked = subprocess.run(["bash", "-n"], input=emit(plan, kind), text=True, capture_output=True)
        assert checked.returncode == 0, checked.stderr


SBATCH = """#!/usr/bin/env bash
echo "$@" >> calls
while [ $# -gt 0 ]; do [ "$1" = --wrap ] && echo "$2" >> commands; shift; done
wc -l < calls
"""


def test_the_slurm_script_submits_a_chain_of_jobs(study: SweepPlan, tmp_path: Path) -> None:
    plan = replace(placed(study, tmp_path), ranks=2)
    fake = tmp_path / "sbatch"
    fake.write_text(SBATCH)
    fake.chmod(0o755)
    script = ["bash", "-c", emit(plan, "slurm")]
    ran = subprocess.run(script, cwd=tmp_path, env={**os.environ, "SBATCH": f"{fake} --partition=gpu"})
    assert ran.returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    number = {next(word for word in call.split() if word.startswith("--job-name=")).partition("=")[2]: str(n)
              for n, call in enumerate(calls, 1)}  # fmt: skip
    assert len(calls) == len(number) == 10
    for point in plan.points:
        stage = number[f"stage_coarse_{point.stages[0].address}"]
        call = calls[int(number[f"point_{point.id}"]) - 1]
        assert f" --dependency=afterok:{stage} --kill-on-invalid-dep=yes " in call
    assert sum("--dependency" in call for call in calls) == 8
    assert all("--partition=gpu" in call and "--gpus-per-node=2" in call for call in calls)


@pytest.mark.parametrize(("visible", "flags"), [("3,4", []), ("", ["--num_gpus", "2"])])
def test_slurm_s_choice_of_gpus_is_kept(
    study: SweepPlan, tmp_path: Path, visible: str, flags: list[str]
) -> None:
    """With --num_gpus DeepSpeed ignores CUDA_VISIBLE_DEVICES, and all jobs of a machine would meet on its first."""
    plan = replace(placed(study, tmp_path), ranks=2)
    for job in jobs_of(plan, "slurm"):
        fake = f"deepspeed() {{ echo $@; }}; {job.command}"
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        said = subprocess.run(["sh", "-c", fake], env=env, capture_output=True, text=True).stdout.split()
        assert said[2 : said.index("--module")] == flags


def test_the_shell_script_skips_what_depends_on_a_failed_job(study: SweepPlan, tmp_path: Path) -> None:
    points = tuple(point for point in study.points if point.seed == 0)
    plan = replace(placed(study, tmp_path), launcher="python", points=points)
    coarse = plan.points[0].stages[0].name
    script = emit(plan, "shell").replace("dit-booth run", "run")
    fake = f'run() {{ echo "$@"; case "$*" in *--stop-after*) return ${{FAIL:-0}};; esac; }}\n{script}'
    ran = subprocess.run(["bash", "-c", fake], capture_output=True, text=True)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (0, 5)
    ran = subprocess.run(["env", "FAIL=3", "bash", "-c", fake], capture_output=True, text=True)
    assert (ran.returncode, len(ran.stdout.splitlines())) == (1, 1)
    assert f"--stop-after {coarse}" in ran.stdout
