"""Budgets, the steps that they buy, the subjects' files, and the same subject in another scene."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_booth.comparison.budget import Budget, flops_text, keep, parse_budget, resolve
from dit_booth.comparison.plan import Plan, make_plan, shared_config
from dit_booth.comparison.subjects import Subject, read_subjects
from dit_booth.comparison.systems import System, SystemCost, find_systems, sample_once, sampling_flops
from dit_booth.config import DataConfig, RunConfig, SubjectConfig
from dit_booth.config.data import TripletsOptions
from dit_booth.cost.flops import Flops
from dit_booth.data.image_prompt import as_image_prompt
from dit_booth.data.toyworld import Toyworld, ToyworldConfig, another_scene, render_video
from dit_booth.data.video import read_video
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.diffusion.start import StartConfig
from dit_booth.sampling.prompts import Request
from dit_booth.testing.tiny import trial

# ---- budget ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2PFLOP", (2e15, None)),
        ("1.5 TFLOPs", (1.5e12, None)),
        ("300gflop", (3e11, None)),
        ("1e9FLOP", (1e9, None)),
        ("60s", (None, 60.0)),
        ("1.5min", (None, 90.0)),
        ("2h", (None, 7200.0)),
    ],
)
def test_a_budget_is_flops_or_seconds(text: str, expected: tuple[float | None, float | None]):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "60", "2P", "0s", "-1s", "60 parsecs", "1e999FLOP"])
def test_anything_else_is_an_error_that_says_what_to_write(text: str):
    with pytest.raises(ValueError, match=r"--budget is .*; write FLOPs or seconds per subject"):
        parse_budget(text)


@pytest.mark.parametrize("flops", [1.0, 999.4, 12_345.0, 487.0e9, 9.999e11, 1.001e15, 3e20])
def test_flops_are_written_as_they_are_read_and_never_too_small(flops: float):
    read, _ = parse_budget(flops_text(flops))
    assert read is not None and flops <= read <= 1.02 * flops


def test_seconds_are_converted_once(tmp_path: Path):
    first = resolve("60s", tmp_path, lambda: 1e9)
    assert first == Budget(text="60s", flops=60e9, throughput=1e9)
    assert resolve("60s", tmp_path, lambda: 2e9).flops == 120e9, "nothing is kept before the plan fits"
    keep(first, tmp_path)
    assert resolve("1min", tmp_path, lambda: 2e9) == first
    with pytest.raises(ValueError, match=r"--budget is '61s', and .* holds a comparison at '60s'"):
        resolve("61s", tmp_path, lambda: 1e9)


# ---- plan --------------------------------------------------------------------------------------------------


def system(name: str) -> System:
    return find_systems([name], {})[0]


ENCODER = SystemCost(steps={"coarse": 10.0, "fine": 30.0}, video=100.0)
OPTIMIZED = SystemCost(steps={"subject": 7.0}, video=100.0, prior=50.0)


def test_the_rest_of_the_budget_is_spent_on_steps():
    plan = make_plan(system("dreambooth"), OPTIMIZED, 1000.0, videos=2, amortise=12)
    assert plan.steps == {"subject": 107}  # (1000 - 2 x 100 - 50) / 7
    assert plan.subject_flops == 2 * 100 + 50 + 107 * 7
    assert plan.shared_flops == 0
    assert not make_plan(system("none"), SystemCost(steps={}, video=100.0), 100.0, videos=1, amortise=9).steps


def test_a_system_that_is_trained_once_has_the_budgets_of_all_subjects():
    plan = make_plan(system("videobooth"), ENCODER, 1000.0, videos=1, amortise=12)
    recipe = system("videobooth").config.stages
    assert plan.steps["coarse"] / plan.steps["fine"] == pytest.approx(
        recipe.coarse.steps / recipe.fine.steps, rel=0.02
    )
    assert plan.shared_flops <= 12 * 900 < plan.shared_flops + 10 + 30
    assert plan.subject_flops == 100 + plan.shared_flops / 12


@pytest.mark.parametrize(("name", "cost"), [("videobooth", ENCODER), ("dreambooth", OPTIMIZED)])
def test_too_small_a_budget_names_the_system_and_the_smallest_that_works(name: str, cost: SystemCost):
    with pytest.raises(ValueError, match=rf"--budget is 90\.0FLOP .* {name}, which needs ") as said:
        make_plan(system(name), cost, 90.0, videos=1, amortise=2)
    least, _ = parse_budget(str(said.value).split("which needs ")[1].split(" ")[0])
    assert least is not None
    plan = make_plan(system(name), cost, least, videos=1, amortise=2)
    assert min(plan.steps.values()) == 1 and plan.subject_flops <= least
    with pytest.raises(ValueError, match="too small"):
        make_plan(system(name), cost, 0.97 * least, videos=1, amortise=2)


def test_a_short_stage_has_a_short_warm_up():
    plan: Plan = make_plan(system("dreambooth"), OPTIMIZED, 1000.0, videos=1, amortise=1)
    config = shared_config(plan, 3, Path("out"), Path("out/run"))
    assert (config.stages.subject.steps, config.stages.subject.warmup) == (121, 12)
    assert (config.train.seed, config.store) == (3, "out/stages")


def test_systems_are_found_by_name_with_the_nearest_for_an_unknown_one(tmp_path: Path):
    kinds = {one.name: one.kind for one in find_systems([], {})}
    assert kinds["videobooth"] == kinds["phantom"] == "encoder"
    assert kinds["dreambooth"] == kinds["tune_a_video"] == "subject"
    assert kinds["none"] == "fixed"
    with pytest.raises(ValueError, match=r"--methods names 'dreambooht'; nearest: dreambooth"):
        find_systems(["dreambooht"], {})
    with pytest.raises(ValueError, match=r"--methods names 'none' twice"):
        find_systems(["none", "none"], {})
    (tmp_path / "both.yaml").write_text("extends: videobooth.yaml\nschedule: [coarse, subject]\n")
    with pytest.raises(ValueError, match="stages coarse, subject are for all subjects and for one"):
        find_systems([str(tmp_path / "both.yaml")], {})


# ---- subjects ----------------------------------------------------------------------------------------------

DATA = DataConfig(size=16, frames=3)


def test_another_scene_shows_the_same_subject_elsewhere():
    world = Toyworld(ToyworldConfig(split="test", size=16, frames=3))
    for index in range(30):
        identity = world[index].identity
        assert identity is not None
        other = asdict(another_scene(identity))
        kept = ("shape", "texture", "colours", "rgb", "scale", "direction")
        assert all(other[name] == identity[name] for name in kept)
        assert other["motion"] != identity["motion"] and other["background"] != identity["background"]
        assert asdict(another_scene(identity)) == other
    assert asdict(another_scene(identity, seed=1)) != other


def test_subjects_are_the_test_prompts_with_files_of_their_own(tmp_path: Path):
    subjects = read_subjects(DATA, "test", 3, tmp_path)
    world = Toyworld(ToyworldConfig(split="test", size=16, frames=3))
    for index, subject in enumerate(subjects):
        example = world[index]
        assert (subject.request.caption, subject.request.identity) == (example.caption, example.identity)
        image = as_image_prompt(subject.image, size=16)
        assert (image - example.image).abs().max() <= 1 / 127.5 + 1e-6
        assert example.identity is not None
        frames, _ = render_video(another_scene(example.identity), frames=3, size=16)
        pixels = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(read_video(subject.video), pixels)
        assert subject.scene.startswith("{} is ")
        assert subject.scene.replace("{}", f"a {example.subject}") != example.caption
    times = [subject.image.stat().st_mtime_ns for subject in subjects]
    again = read_subjects(DATA, "test", 3, tmp_path)
    assert [subject.image.stat().st_mtime_ns for subject in again] == times


def test_a_subjects_settings_name_its_files(tmp_path: Path):
    (subject,) = read_subjects(DATA, "test", 1, tmp_path)
    image = subject.settings(RunConfig.create("dreambooth").subject)
    assert (image.image, image.video, image.token) == (str(subject.image), "", "sks")
    video = subject.settings(RunConfig.create("tune_a_video").subject)
    assert (video.video, video.captions) == (subject.video, (subject.scene,))
    data = video.build(frames=3, size=(16, 16), side=16, seed=0, prior=None)
    assert data[0].video.shape == torch.Size([3, 3, 16, 16]) and data[0].caption.startswith("a")


def read_clips(root: Path, files: Path, count: int, frames: int = 2) -> list[Subject]:
    options = TripletsOptions(root=str(root), stride=1)
    return read_subjects(
        DataConfig(kind="triplets", size=16, frames=frames, triplets=options), "test", count, files
    )


def test_a_clip_on_disk_is_tuned_on_where_it_is_not_compared(tmp_path: Path, write_triplets):
    root = write_triplets(tmp_path / "data", ["a black cat runs", "the cat sleeps"], "cat")
    subjects = read_clips(root, tmp_path / "rest", 2)
    assert [subject.scene for subject in subjects] == ["{} runs", "{} sleeps"]
    whole = read_clips(root, tmp_path / "whole", 2, frames=3)
    for few, many in zip(subjects, whole, strict=True):
        after, truth = read_video(few.video), as_pixels(many.request.truth)
        assert after.shape == (2, 16, 16, 3)
        assert np.array_equal(after[0], truth[2]), "frames 2 and 3: those after the two that are compared"
        assert not np.array_equal(read_video(many.video)[0], truth[2])
    with (root / "all.csv").open("w") as file:
        file.write(
            "videoid,page_dir,name,image_from\nclip0,page,a cat runs,clip1\nclip1,page,the cat sleeps,\n"
        )
    (paired, other) = read_clips(root, tmp_path / "paired", 2)
    assert paired.scene == "{} sleeps", "the clip that the image prompt is cut from"
    assert np.array_equal(read_video(paired.video), as_pixels(other.request.truth))


def as_pixels(video: Tensor | None) -> np.ndarray:
    assert video is not None
    return ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def test_a_clip_without_further_frames_refuses_systems_that_tune_on_videos(tmp_path: Path, write_triplets):
    root = write_triplets(tmp_path / "data", ["a cat runs", "a cat sleeps"], "cat")
    subjects = read_clips(root, tmp_path / "subjects", 2, frames=4)  # of 6
    assert subjects[0].settings(SubjectConfig()).word == "cat"
    with pytest.raises(ValueError, match=r"has no second video"):
        subjects[0].settings(SubjectConfig(tune_on="video"))
    with pytest.raises(ValueError, match=r"--subjects is 3, and the test split has 2"):
        read_clips(root, tmp_path / "subjects", 3)


def test_an_image_prompt_without_subject_is_an_error_of_its_subject(tmp_path: Path):
    (subject,) = read_subjects(DATA, "test", 1, tmp_path)
    white = replace(subject, request=replace(subject.request, image=torch.ones(3, 16, 16)))
    with pytest.raises(ValueError, match=r"the image prompt of toyworld/0/test/0 is all white"):
        white.settings(SubjectConfig())
    unnamed = replace(subject, request=replace(subject.request, subject=""))
    with pytest.raises(ValueError, match=r"the image prompt of toyworld/0/test/0 has no subject in words"):
        unnamed.settings(SubjectConfig())


# ---- costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["noise", "warp"])
@pytest.mark.parametrize("kind", ["ddim", "heun"])
def test_the_cost_of_a_video_is_that_of_sampling_it(start: str, kind: str):
    """Two strategies' passes, guidance, and all steps: the count is exact, not an estimate."""
    components = trial(
        "token_replacement+kv_concat",
        objective=ObjectiveConfig(kind="eps" if kind == "ddim" else "flow"),
        sampler=SamplerConfig(kind=kind, steps=9),  # type: ignore[arg-type]
        guidance=GuidanceConfig(scale=2.0),
        start=StartConfig(kind=start, denoised=0.4, renoised=0.2),  # type: ignore[arg-type]
    ).components
    request = Request(prompt="p", caption="a dog runs", subject="dog", image=torch.zeros(3, 12, 12))
    with Flops() as counter:
        sample_once(components, request, 9)
    assert sampling_flops(components, request) == pytest.approx(counter.total, rel=1e-9)
