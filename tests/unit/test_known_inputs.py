"""Known frames, timesteps by frame and the subject's mask, from a batch to the loss, and from clip to clip."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dit_booth.components import Components
from dit_booth.config import LongConfig, StageConfig
from dit_booth.data.example import Batch, collate
from dit_booth.diffusion.clip_sampling import ClipsConfig
from dit_booth.diffusion.known_frames import KnownFramesConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.objectives import foreground_mse
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.models.injected import Prediction
from dit_booth.sampling.generate import KnownVideo, generate
from dit_booth.testing import trial, worst
from dit_booth.training.inputs import Inputs, generator_of, make_inputs

torch.set_num_threads(1)
BATCH, FRAMES = 4, 3
KINDS: dict[str, ObjectiveConfig] = {
    "eps": ObjectiveConfig(),
    "flow": ObjectiveConfig(kind="flow", prediction="x0"),
}


@cache
def parts_of(strategy: str = "lvdm", kind: str = "flow", **settings: Any) -> Components:
    return trial(strategy, objective=KINDS[kind], **settings).perturb().components


@cache
def batch() -> Batch:
    data = parts_of("none").config.data.build()
    return collate([data[i] for i in range(BATCH)])


def inputs(
    components: Components, stage: StageConfig | None = None, given: Batch | None = None, **options: Any
) -> Inputs:
    draws = [generator_of(0, row) for row in range(BATCH)]
    return make_inputs(
        components, given or batch(), stage or StageConfig(), draws, torch.float32, True, **options
    )


# ---- known frames ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_known_frames_have_a_level_and_noise_of_their_own(kind: str) -> None:
    components = parts_of(kind=kind)
    made, objective = inputs(components), components.objective
    assert made.known is not None and made.known.shape == (BATCH, FRAMES, 1, 1, 1)
    known = made.known.flatten(1).bool()
    assert {tuple(row) for row in known.tolist()} == {(True, False, False), (False,) * 3}
    assert torch.equal(made.x_t, objective.noise(made.x0, made.t, made.eps))
    assert torch.equal(made.timestep, objective.timestep(made.t)) and made.t.shape == (BATCH, FRAMES)
    plain = inputs(parts_of("none", kind))
    assert plain.known is None and plain.t.shape == (BATCH,)
    assert (made.timestep[known] < 250).all()
    t = plain.t.unsqueeze(1).expand(-1, FRAMES)
    assert torch.equal(made.t[~known], t[~known]), "the others are at the video's"
    same = (made.eps == inputs(components, t=made.t[:, 1]).eps).flatten(2).all(2)
    assert not same[known].any(), "noise of their own"


def test_a_row_draws_its_known_frames_alone() -> None:
    components = parts_of()
    whole = inputs(components)
    half = make_inputs(
        components,
        collate([components.config.data.build()[i] for i in range(2)]),
        StageConfig(),
        [generator_of(0, row) for row in range(2)],
        torch.float32,
        True,
    )
    assert whole.known is not None and half.known is not None
    assert torch.equal(half.known, whole.known[:2]) and torch.equal(half.x_t, whole.x_t[:2])


def test_a_given_t_is_that_of_all_frames_and_none_is_known() -> None:
    """So a validation's loss is one by noise level, as for every strategy."""
    made = inputs(parts_of(), t=torch.full((BATCH,), 0.5))
    assert made.known is None and made.t.shape == (BATCH,)


def test_known_frames_reach_the_network_by_their_mask() -> None:
    components = parts_of()
    made = inputs(components)
    assert made.known is not None
    told = made.predict(components.model).output
    untold = replace(made, known=None).predict(components.model).output
    some = made.known.flatten(1).any(1)
    assert worst(told[some], untold[some]) > 1e-4 and torch.equal(told[~some], untold[~some])


def test_all_frames_count_in_the_loss_at_their_own_level() -> None:
    components = parts_of()
    made = inputs(components)
    output = torch.randn_like(made.x0)
    loss = made.loss(components.objective, Prediction(output, torch.zeros(())))
    weight = 1 / made.t.clamp_min(components.config.objective.t_min).square()
    error = (output - made.x0).square().flatten(2).mean(2)
    torch.testing.assert_close(loss, (weight * error).mean())


def test_more_known_frames_than_there_are_is_an_error() -> None:
    components = parts_of()
    config = replace(components.config, known=KnownFramesConfig(previous=(FRAMES,)))
    with pytest.raises(ValueError, match=r"known\.previous has 3, of clips with 3 frames"):
        inputs(replace(components, config=config))


# ---- timesteps by frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_is_trained_at_a_t_of_its_own(kind: str) -> None:
    components = parts_of("kv_concat", kind)
    objective = replace(components.config.objective, per_frame=True)
    made = inputs(replace(components, config=replace(components.config, objective=objective)))
    assert made.t.shape == made.timestep.shape == (BATCH, FRAMES)
    assert made.t.unique().numel() == BATCH * FRAMES
    assert torch.equal(made.x_t, components.objective.noise(made.x0, made.t, made.eps))
    assert made.reference is not None and made.reference.noisy is not None
    clean, first = made.reference.latent, made.t[:, 0]
    signal = components.objective.noise(clean, first, torch.zeros_like(clean))
    scale = components.objective.noise(torch.zeros_like(clean), first, torch.ones_like(clean))
    assert 0.7 < ((made.reference.noisy - signal) / scale).std() < 1.3, "the reference is at frame 0's"
    loss = made.loss(components.objective, made.predict(components.model))
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in components.model.parameters())


# ---- the subject alone -------------------------------------------------------------------------------------


def test_the_loss_is_one_of_the_subject() -> None:
    components = parts_of("none", "eps")
    made = inputs(components, StageConfig(foreground=True))
    output = torch.randn_like(made.x0)
    loss = made.loss(components.objective, Prediction(output, torch.zeros(())))
    blocks = rearrange(batch().mask.float(), "b f (h p) (w q) -> b f 1 h w p q", p=3, q=3)
    torch.testing.assert_close(loss, foreground_mse(output, made.eps, blocks.mean((-2, -1))).mean())
    assert made.region is not None and (made.region == 0).any()
    changed = torch.where(made.region > 0, output, output + 7)
    assert torch.equal(loss, made.loss(components.objective, Prediction(changed, torch.zeros(()))))


def test_a_crop_keeps_the_masks_of_its_frames() -> None:
    components = parts_of("none", "eps")
    mask = torch.zeros_like(batch().mask)
    mask[:, 1] = True  # of three frames the one that is in every crop of two, first or last
    video = torch.where(mask, 1.0, -1.0).unsqueeze(2).expand(-1, -1, 3, -1, -1)
    made = inputs(
        components, StageConfig(frames=2, foreground=True), replace(batch(), mask=mask, video=video)
    )
    assert made.region is not None
    places = (made.region > 0).flatten(2).all(2)
    assert torch.equal(places, (made.x0 == 1).flatten(2).all(2))
    assert len(places.unique(dim=0)) == 2


def test_data_without_masks_are_an_error_that_names_the_example() -> None:
    bare = replace(batch(), mask=torch.zeros_like(batch().mask))
    with pytest.raises(
        ValueError, match=r"toyworld/0/train/0 has no mask of its subject .* foreground is true"
    ):
        inputs(parts_of("none", "eps"), StageConfig(foreground=True), bare)


# ---- images without a subject ------------------------------------------------------------------------------


def white() -> Tensor:
    images = batch().image.clone()
    images[1] = 1.0
    return images


def test_a_white_image_prompt_is_an_error_in_training_where_it_is_read() -> None:
    blank = replace(batch(), image=white())
    with pytest.raises(ValueError, match=r"image prompt of toyworld/0/train/1 is all white; give a picture"):
        inputs(parts_of("elite_local"), given=blank)
    inputs(parts_of("lvdm"), given=blank)


def test_a_white_image_prompt_is_an_error_in_sampling() -> None:
    with pytest.raises(ValueError, match=r"image prompt of a red cat is all white"):
        video(parts_of("elite_local"), images=white())
    assert video(parts_of("elite_local"), images=white(), use_image=False).isfinite().all()


# ---- from clip to clip -------------------------------------------------------------------------------------


def video(
    components: Components,
    frames: int = FRAMES,
    images: Tensor | None = None,
    rows: slice = slice(2),
    **options: Any,
) -> Tensor:
    return generate(
        components,
        (batch().image if images is None else images)[:2][rows],
        ["a dog runs", "a red cat"][rows],
        ["dog", "cat"][rows],
        [1, 2][rows],
        size=(frames, 12, 12),
        guidance=components.config.guidance,
        sampler=SamplerConfig(steps=2),
        **options,
    )


def test_further_frames_are_predicted_clip_by_clip() -> None:
    components = parts_of()
    lvdm = LongConfig(kind="lvdm")
    first, long = video(components), video(components, 8, long=lvdm)
    assert long.shape == (2, 8, 3, 12, 12)
    assert torch.equal(long[:, :FRAMES], first), "clips follow a first one without known frames"
    assert worst(long[:, FRAMES : 2 * FRAMES - 1], first[:, 1:]) > 1e-3
    assert worst(long[1:], video(components, 8, rows=slice(1, 2), long=lvdm)) < 1e-4, "a row is its own"
    config = replace(components.config, clips=ClipsConfig(overlap=2))
    assert worst(video(replace(components, config=config), 8, long=lvdm)[:, FRAMES:], long[:, FRAMES:]) > 1e-3
    whole = parts_of("none")
    assert video(whole, 8).shape == long.shape, "without known frames a video is one clip"


def test_known_frames_of_a_video_stay() -> None:
    components = parts_of()
    mask = torch.zeros(2, FRAMES, 1, 1, 1)
    mask[0, 0] = mask[1, [0, 2]] = 1
    known = KnownVideo(batch().video[:2], mask)
    made = video(components, known=known)
    assert worst(made * mask, known.video * mask) < 1e-6
    others = KnownVideo(batch().video[2:], mask)
    assert worst(video(components, known=others) * (1 - mask), made * (1 - mask)) > 1e-4
    with pytest.raises(ValueError, match=r"known has a video .* f = 3, the frames of a clip"):
        video(components, known=KnownVideo(batch().video[:2, :2], mask))
