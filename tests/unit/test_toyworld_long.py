"""Long scenes of the toy world: the same at every length, true frame by frame, scored under their light."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_booth.config import RunConfig
from dit_booth.data.toyworld import LongIdentity, Toyworld, ToyworldConfig, as_identity
from dit_booth.data.toyworld.long import MOTIONS, PIECE, render_long, truth_of, under_white_light
from dit_booth.data.toyworld.world import progress_of, render_video
from dit_booth.evaluation.case import Case
from dit_booth.evaluation.drift import last_minus_first
from dit_booth.evaluation.oracle import oracle_scores
from dit_booth.training.address import stages_of

torch.set_num_threads(1)
CONFIG = ToyworldConfig(split="test", scene="long", frames=24, size=32)


def identity(index: int) -> LongIdentity:
    found = Toyworld(CONFIG)[index].identity
    assert found is not None
    it = as_identity(found)
    assert isinstance(it, LongIdentity)
    return it


def test_a_scene_is_the_same_at_every_length_and_whatever_the_caption_names() -> None:
    it = identity(3)
    for change in ({"frames": 7}, {"size": 24}, {"describe": "full"}, {"image_size": 40}):
        other = Toyworld(replace(CONFIG, **change))[3]  # type: ignore[arg-type]
        assert other.identity is not None and as_identity(other.identity) == it
    assert Toyworld(replace(CONFIG, seed=1))[3].identity != Toyworld(CONFIG)[3].identity
    assert as_identity(json.loads(json.dumps(Toyworld(CONFIG)[3].identity))).shape == it.shape


def test_pieces_are_the_whole() -> None:
    """Frame i of a video rendered in pieces is that of a video of that frame's progress alone."""
    it, frames = identity(0), PIECE + 3
    video, mask = render_long(it, frames=frames, size=16)
    truth = truth_of(it, frames=frames, size=16)
    assert np.array_equal(mask.numpy(), truth.mask) and video.shape == (frames, 3, 16, 16)
    assert not torch.equal(video[PIECE - 1], video[PIECE])
    again, _ = render_long(it, frames=2 * frames - 1, size=16)
    assert torch.equal(again[::2], video)


def test_motion_reverses_and_pose_light_and_bar_change() -> None:
    seen = set()
    for index in range(12):
        it, truth = identity(index), truth_of(identity(index), frames=64, size=24)
        step = np.diff(truth.poses[:, :2], axis=0)
        signs = np.sign(step[np.abs(step) > 1e-6].reshape(-1))
        assert {-1.0, 1.0} <= set(signs.tolist()), "there and back"
        assert np.ptp(truth.poses[:, 2]) > 0.1 * it.radius
        gains = truth.rgb / np.asarray(it.rgb)
        assert gains.max() <= 1 + 1e-6 and np.abs(gains[-1] - gains[0]).max() > 0.15
        bar = it.has_bar(progress_of(64))
        assert np.all(truth.visible[~bar] == 1) and truth.visible[bar].min() < 0.9
        assert not bar[:16].any() and not bar[-16:].any(), "drift is measured in the outer quarters"
        centre, radius = truth.poses[:, :2], truth.poses[:, 2:3]
        inside = (centre - radius > -1e-6) & (centre + radius < 1 + 1e-6)
        assert inside.all(), "the subject stays in the frame"
        seen.add(it.motion)
    assert seen == set(MOTIONS)


def test_the_mask_is_the_unlit_subject_less_the_bar() -> None:
    it = identity(1)
    video, mask = render_long(it, frames=24, size=48)
    plain, whole = render_video(it, frames=24, size=48)  # without light and bar
    bar = torch.from_numpy(it.has_bar(progress_of(24)))
    assert torch.equal(mask[~bar], whole[~bar])
    assert not (mask & ~whole).any() and (whole & ~mask)[bar].any()
    unlit = under_white_light(video, it)
    assert (unlit[~bar] - plain[~bar]).abs().max() < 1e-5
    assert (video[-1] - plain[-1]).abs().max() > 0.1 or (video[0] - plain[0]).abs().max() > 0.1


def test_24_prompts_that_no_other_scene_has() -> None:
    prompts = {Toyworld(replace(CONFIG, frames=1, size=8))[i].caption for i in range(24)}
    others = {
        Toyworld(ToyworldConfig(frames=1, size=8, split=split))[i].caption
        for split in ("train", "dev", "test")
        for i in range(24)
    }
    assert len(prompts) == 24 and not prompts & others
    assert all(prompt.endswith(", and a bar passes") for prompt in prompts), "words of long scenes alone"


def test_the_truth_has_no_drift_under_its_light_and_the_bar_has_no_score() -> None:
    example = Toyworld(CONFIG)[1]
    it = identity(1)
    case = Case(video=example.video, image=example.image, caption=example.caption, identity=example.identity)
    scores = {name: np.asarray(value) for name, value in oracle_scores(case).items()}
    bar = it.has_bar(progress_of(24))
    hidden = bar | np.concatenate([[False], bar[:-1]])
    assert all(np.isnan(value[hidden]).all() for value in scores.values())
    assert np.nanmean(scores["appearance"]) < 1 and abs(last_minus_first(scores["appearance"])) < 0.5
    assert np.nanmean(scores["right_shape"]) == 1
    white = replace(case, identity={**example.identity, "light": "cooling"})  # type: ignore[dict-item]
    assert it.light != "cooling"
    assert abs(last_minus_first(oracle_scores(white)["appearance"])) > 2, "another light is drift"


def test_the_kind_of_scene_enters_a_run_only_where_it_is_long() -> None:
    runs = [RunConfig.create(data={"toyworld": {"scene": scene}}) for scene in ("short", "long")]
    settings = runs[0].as_dict()
    del settings["data"]["toyworld"]["scene"]
    assert RunConfig.create(settings).fingerprint() == runs[0].fingerprint() != runs[1].fingerprint()
    assert stages_of(runs[0])[0].address != stages_of(runs[1])[0].address
    with pytest.raises(ValueError, match=r"data\.toyworld\.scene is 'huge'; choose one of short, long"):
        ToyworldConfig(scene="huge")  # type: ignore[arg-type]
