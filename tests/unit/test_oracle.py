"""The oracle recovers what was rendered, and every planted failure moves its own metrics and no other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_booth.data.example import Example
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.toyworld.looks import draw_looks
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES
from dit_booth.data.toyworld.world import (
    Identity,
    render_prompt,
    render_video,
    sample_identity,
)
from dit_booth.data.video import write_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.folder import write_videos
from dit_booth.evaluation.oracle import best_shapes, oracle_scores, shape_overlaps, track_subject
from dit_booth.evaluation.oracle.pose import first_of_each, fold, local, nearly_best, refine
from dit_booth.evaluation.oracle.shape import overlap, overlap_bounds
from dit_booth.evaluation.oracle.subject import Track
from experiments.bench import oracle as bench

torch.set_num_threads(1)

MOTIONS = ("left", "spinning", "growing", "bouncing", "shrinking", "down")


def scene(seed: int, **changes: object) -> Identity:
    identity = sample_identity(rng := np.random.default_rng(seed), draw_looks(rng, "train", 0))
    return replace(identity, **changes)  # type: ignore[arg-type]


def case_of(identity: Identity, video: torch.Tensor) -> Case:
    image = render_prompt(identity, size=video.shape[-1])
    return Case(video=video, image=image, caption="", identity=asdict(identity))


def scores_of(case: Case) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in oracle_scores(case).items()}


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    world = Toyworld(ToyworldConfig(frames=2, split="dev", seed=4))
    return [world[i] for i in range(10)]


@pytest.fixture(scope="module")
def means(examples: list[Example]) -> Callable[[str], dict[str, float]]:
    """Return a function: a failure's name to the mean of every metric over the examples that it applies to."""

    @cache
    def of_failure(failure: str) -> dict[str, float]:
        planted = [(bench.FAILURES[failure](example), example) for example in examples]
        rows = [bench.score(bench._case(video, example)) for video, example in planted if video is not None]
        return {
            name: float(np.mean([row[name] for row in rows if name in row])) for name in bench.METRICS[:6]
        }

    return of_failure


@pytest.fixture(scope="module")
def every_subject() -> list[tuple[Identity, Mapping[str, np.ndarray], Track]]:
    """Every shape in two textures, 24 scenes of 3 frames in all motions, scored and tracked."""
    found = []
    pairs = [(shape, texture) for i, shape in enumerate(SHAPES) for texture in list(TEXTURES)[i % 3 :: 3]]
    for number, (shape, texture) in enumerate(pairs):
        drawn = scene(number)
        while len(set(drawn.colours)) < 2:  # of two colours
            drawn = scene(number := number + 1000)
        motion = MOTIONS[number % len(MOTIONS)]
        turn = math.radians(25) if motion == "spinning" else 0.0
        rgb = (drawn.rgb[0],) * 2 if texture == "plain" else drawn.rgb
        identity = replace(drawn, shape=shape, texture=texture, motion=motion, turn=turn, rgb=rgb)
        if motion in ("growing", "shrinking"):
            identity = replace(identity, start=(0.5, 0.5), end=(0.5, 0.5))
        video, _ = render_video(identity, frames=3, size=32)
        found.append((identity, scores_of(case_of(identity, video)), track_subject(video, identity)))
    return found


def test_poses_are_recovered(every_subject):
    errors, turned = [], []
    for identity, _, track in every_subject:
        progress = np.linspace(0, 1, 3)
        along = np.abs(np.sin(2 * np.pi * progress)) if identity.motion == "bouncing" else progress
        start, end = np.array(identity.start), np.array(identity.end)
        centre = start + (end - start) * rearrange(along, "f -> f 1")
        growth = {"growing": 0.65 + 0.55 * progress, "shrinking": 1.2 - 0.55 * progress}
        radius = identity.radius * growth.get(identity.motion, np.ones(3))
        errors.append(32 * np.abs(track.poses[:, :3] - np.column_stack([centre, radius])))
        if track.turns:
            period = 2 * math.pi / track.turns
            angle = identity.angle + identity.turn * progress - track.angles
            turned.append(np.degrees(np.abs(angle - period * np.round(angle / period))))
    assert np.mean(errors) < 0.05 and np.max(errors) < 1.0  # pixels
    assert np.mean(turned) < 0.5 and np.quantile(turned, 0.98) < 4  # degrees


def test_true_renders_score_as_true(every_subject):
    columns = {name: np.concatenate([scores[name] for _, scores, _ in every_subject]) for name in
               ("appearance", "right_shape", "shape", "right_texture")}  # fmt: skip
    assert columns["right_shape"].mean() > 0.99
    assert columns["right_texture"].mean() > 0.99
    assert columns["appearance"].mean() < 0.7 and np.quantile(columns["appearance"], 0.95) < 5
    assert columns["shape"].mean() == pytest.approx(1, abs=0.05)


def test_motion_is_that_of_the_scene(every_subject):
    for identity, scores, track in every_subject:
        assert all(np.isnan(scores[name][0]) for name in ("speed", "growth", "rotation"))
        if identity.motion == "left":
            travel = math.dist(identity.start, identity.end) / 2
            assert scores["speed"][1:] == pytest.approx(travel, abs=0.01)
        elif identity.motion == "growing":
            assert scores["growth"][1:] == pytest.approx((0.275 / 0.65, 0.275 / 0.925), abs=0.05)
        elif identity.motion == "spinning" and track.turns:
            assert scores["rotation"][1:] == pytest.approx(12.5, abs=4)


@pytest.mark.parametrize(
    ("shape", "texture", "turns"),
    [("circle", "plain", 0), ("circle", "striped", 2), ("circle", "halved", 1), ("square", "plain", 4),
     ("square", "halved", 4), ("triangle", "plain", 3), ("heart", "dotted", 1)],
)  # fmt: skip
def test_rotation_counts_modulo_the_symmetry(shape, texture, turns):
    first, other = scene(3).rgb[0], (0.1, 0.1, 0.1)
    identity = scene(3, shape=shape, texture=texture, rgb=(first, first if texture == "plain" else other))
    video, _ = render_video(identity, frames=2, size=32)
    track = track_subject(video, identity)
    assert track.turns == turns
    assert np.isnan(track.motion()["rotation"]).all() == (turns == 0)


# What each failure does to the mean, beyond the truth's: bounds of appearance, shape and palette, and the two shares.
APPEARANCE = {"wrong texture": 15, "texture turned by 45°": 6, "texture 40% larger": 8, "colours swapped": 8,
              "hue turned by 40°": 12, "wrong shape": 8, "missing subject": 25}  # fmt: skip


@pytest.mark.parametrize("failure", APPEARANCE)
def test_appearance_counts_every_failure(failure, means):
    assert means(failure)["appearance"] > APPEARANCE[failure]


@pytest.mark.parametrize(
    "failure", ["wrong texture", "texture turned by 45°", "texture 40% larger", "colours swapped"]
)
def test_a_wrong_texture_leaves_the_shape(failure, means):
    row = means(failure)
    assert row["right_shape"] > 0.95 and row["shape"] > 0.85
    assert (row["right_texture"] == 0) if failure == "wrong texture" else (row["right_texture"] > 0.8)


def test_a_wrong_shape_leaves_the_texture_and_the_colours(means):
    row = means("wrong shape")
    assert row["right_shape"] == 0 and row["shape"] < 0.3
    assert row["right_texture"] > 0.8 and row["palette"] < 6


def test_a_mirrored_subject_is_no_failure(means):
    truth, mirrored = means("ground truth"), means("mirrored (no failure)")
    for name, margin in (
        ("appearance", 0.3),
        ("right_shape", 0.01),
        ("shape", 0.02),
        ("right_texture", 0.01),
    ):
        assert mirrored[name] == pytest.approx(truth[name], abs=margin)
    crescent = scene(1, shape="crescent")
    video, _ = render_video(crescent, frames=2, size=32)
    assert not track_subject(video, crescent).mirrored
    assert track_subject(video.flip(-1), crescent).mirrored


def test_blur_costs_shape_and_appearance_but_not_the_names(means):
    row = means("blurred")
    assert row["right_shape"] > 0.8 and row["right_texture"] > 0.8
    assert row["appearance"] > 4 and row["shape"] < 0.9


def test_noise_counts_in_appearance(means):
    some, more = means("noise, 5% of the range"), means("noise, 10% of the range")
    assert 4 < some["appearance"] < more["appearance"]
    assert some["right_shape"] > 0.7


def test_a_still_video_has_no_motion_and_the_right_looks(examples):
    case = bench._case(bench.still(examples[0]), examples[0])
    scores = scores_of(case)
    for name in ("speed", "growth", "rotation"):
        assert np.nan_to_num(scores[name]) == pytest.approx(0, abs=1e-6)
    assert scores["right_shape"].all()


@pytest.mark.parametrize("pair", [("circle", "square"), ("square", "circle")])
def test_a_circle_drawn_for_a_square_is_found_out(pair):
    true, drawn = pair
    for seed in range(6):
        identity = scene(seed, shape=true)
        video, _ = render_video(replace(identity, shape=drawn), frames=2, size=32)
        scores = scores_of(case_of(identity, video))
        assert not scores["right_shape"].any()
        assert (scores["shape"] < 0.75).all()


def test_a_frame_without_a_subject_is_counted(examples):
    identity = scene(7, shape="star", motion="still", start=(0.5, 0.5), end=(0.5, 0.5))
    video, _ = render_video(identity, frames=4, size=32)
    gone, _ = render_video(replace(identity, start=(9.0, 9.0), end=(9.0, 9.0)), frames=1, size=32)
    video[1] = gone[0]
    scores = scores_of(case_of(identity, video))
    floor, ceiling = overlap_bounds("star", 32)
    assert scores["right_shape"].tolist() == scores["right_texture"].tolist() == [1, 0, 1, 1]
    assert scores["shape"][1] == pytest.approx(-floor / (ceiling - floor))
    assert scores["appearance"][1] > 20 > 5 > scores["appearance"][[0, 2, 3]].max()
    assert np.isnan(scores["speed"]).tolist() == [True, True, True, False]


def test_floors_and_ceilings_are_apart():
    for shape in SHAPES:
        floor, ceiling = overlap_bounds(shape, 32)
        assert 0.45 < floor < 0.78 and 0.94 < ceiling < 1


@pytest.mark.parametrize("size", [64, 100])
def test_other_sizes(size):
    identity = scene(
        11, shape="arrow", texture="striped", rgb=((0.9, 0.1, 0.1), (0.1, 0.1, 0.6)), background="snow"
    )
    video, _ = render_video(identity, frames=2, size=size)
    scores = scores_of(case_of(identity, video))
    assert scores["right_shape"].all() and scores["right_texture"].all()
    assert scores["appearance"].max() < 3


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.sampled_from(list(SHAPES)), st.floats(0.25, 0.4), st.floats(-math.pi, math.pi), st.floats(0.42, 0.58)
)
def test_any_pose_of_a_shape_is_named(shape, radius, angle, centre):
    identity = scene(5, shape=shape, radius=radius, angle=angle, start=(centre, 1 - centre), motion="still")
    video, _ = render_video(identity, frames=1, size=32)
    assert best_shapes(video) == [shape]
    assert shape_overlaps(video, shape)[0] > 0.9


def test_what_has_no_oracle_scores():
    video = torch.zeros(2, 3, 32, 48)
    image = torch.ones(3, 32, 32)
    assert oracle_scores(Case(video=video, image=image, caption="")) == {}
    with pytest.raises(ValueError, match="frames of 32 x 48 pixels; the toy world's are square"):
        oracle_scores(Case(video=video, image=image, caption="", identity=asdict(scene(0))))
    with pytest.raises(ValueError, match="shape is 'blob'; choose one of circle, "):
        shape_overlaps(torch.zeros(1, 3, 32, 32), "blob")
    empty = torch.full((2, 3, 32, 32), 0.5)
    assert best_shapes(empty) == ["", ""] and not shape_overlaps(empty, "star").any()


def test_overlaps_are_worked_out_by_hand():
    full, half = np.ones((1, 4, 4), np.float32), np.full((1, 4, 4), 0.5, np.float32)
    assert overlap(full, half) == pytest.approx(0.5)
    half[:, 2:] = 0
    assert overlap(full, half) == pytest.approx(0.25)
    assert overlap(full * 0, full * 0) == 0


def test_equal_rotations_are_counted():
    angles = np.radians(np.arange(0, 360, 6))
    waves = {turns: np.cos(turns * rearrange(angles, "a -> a 1") + np.arange(5)) for turns in (1, 2, 5, 6)}
    for turns, bank in waves.items():
        assert fold(bank.astype(np.float32), 0.01) == turns
    assert fold(np.ones((60, 5), np.float32), 0.01) == 60


def test_the_best_of_each_row_and_group():
    losses = np.array([[5.0, 1, 5, 1.2, 5, 3, 4], [1.0, 2, 3, 4, 3, 2.5, 2]])
    rows, columns = nearly_best(losses, 2, 1.5)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (0, 3), (1, 0)]
    assert first_of_each(np.array([0, 0, 1, 1]), np.array([2.0, 1, 3, 4])).tolist() == [1, 2]


def test_refinement_finds_a_disc_and_never_makes_worse():
    rng, still = np.random.default_rng(0), np.zeros(20, bool)

    def draw(x, y, pixels):
        return np.clip(0.5 - (np.sqrt(x * x + y * y) - 0.9) * pixels, 0, 1)[:, None]

    true = np.column_stack([rng.uniform(0.4, 0.6, (20, 2)), rng.uniform(0.2, 0.3, 20), np.zeros(20)])
    target = draw(*local(true, still, 32)).astype(np.float32)
    start = true + np.column_stack([rng.uniform(-0.04, 0.04, (20, 3)), np.zeros(20)])
    before = np.square(draw(*local(start, still, 32)) - target).sum((1, 2, 3))
    poses, loss = refine(draw, target, start, still, iterations=6)
    assert (loss <= before).all()
    assert np.abs(poses - true)[:, :3].max() < 0.002
    far = np.tile([0.1, 0.1, 0.05, 0.0], (20, 1))
    missed = np.square(draw(*local(far, still, 32)) - target).sum((1, 2, 3))
    assert (refine(draw, target, far, still, iterations=1)[1] <= missed + 1e-3).all()


def test_the_bench_reads_sampled_videos(tmp_path, examples, capsys):
    cases = {}
    for number, example in enumerate(examples[:2]):
        e, name = example, f"{number:03d}.mp4"
        common = {
            "image": e.image,
            "caption": e.caption,
            "prompt": e.key,
            "truth": e.video,
            "identity": e.identity,
        }
        cases[name] = Case(video=e.video, **common)
        cases[f"{number}-none.mp4"] = Case(video=-e.video, **common, control="none")
    for name, case in cases.items():
        write_video(tmp_path / name, case.video, fps=8)
    write_videos(tmp_path, cases, fps=8)
    read = list(bench.read_run(tmp_path))
    assert [case.identity["shape"] for case in read] == [e.identity["shape"] for e in examples[:2]]
    assert all(bench.score(case)["right_shape"] == 1 for case in read)
    with pytest.raises(ValueError, match="cannot be read"):
        list(bench.read_run(tmp_path / "none"))
    capsys.readouterr()
    seen = [{"video": f"{n:03d}", "subject": examples[n].subject, "right": [1, n]} for n in range(2)]
    (tmp_path / "eye.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seen))
    bench.main(
        bench.OracleArguments(examples=2, frames=1, runs=(str(tmp_path),), eye=str(tmp_path / "eye.jsonl"))
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| ground truth | 2 | ") and "| missing subject | 2 | " in "".join(lines)
    assert "3 of 4 frames judged by eye as by right_shape" in lines
    assert f"- 000, frame 1: a {examples[0].subject}, wrong by eye; best fit: {examples[0].subject}" in lines
