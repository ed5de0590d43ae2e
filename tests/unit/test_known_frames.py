"""Known frames (LVDM): which they are, at what noise the network sees them, and how clips follow each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, make_objective
from dit_booth.diffusion.clip_sampling import (
    ClipModel,
    ClipSampler,
    ClipsConfig,
    Known,
    continuations,
    interpolate_frames,
    predict_frames,
    sparse_frames,
    windows,
)
from dit_booth.diffusion.inversion import DDIMPath, sample_along
from dit_booth.diffusion.known_frames import (
    KnownFramesConfig,
    draw_known,
    known_mask,
    network_input,
    per_sample_l1,
    put_frames,
    training_pair,
)
from dit_booth.diffusion.objectives import EpsObjective
from dit_booth.diffusion.samplers import Model

torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def video(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# ---- masks -------------------------------------------------------------------------------------------------


def frames_of(mask: Tensor) -> list[list[int]]:
    return [row.flatten().nonzero().flatten().tolist() for row in mask]


def test_a_draw_below_the_first_share_interpolates_below_the_sum_predicts() -> None:
    config = KnownFramesConfig(interpolation=0.3, prediction=0.5, previous=(1, 2))
    uniform, previous = torch.tensor([0.29, 0.3, 0.79, 0.8]), torch.tensor([1, 1, 2, 2])
    assert frames_of(known_mask(config, uniform, previous, 5)) == [[0, 4], [0], [0, 1], []]
    config = KnownFramesConfig(interpolation=1.0, prediction=0.0, stride=3)
    assert frames_of(known_mask(config, uniform[:1], previous[:1], 8)) == [[0, 3, 6]]


def test_drawn_masks_have_their_shares_and_every_clip_a_level() -> None:
    config = KnownFramesConfig(interpolation=0.2, prediction=0.5, previous=(1, 3), max_level=50)
    mask, level = draw_known(config, 4000, 6, seeded())
    assert mask.shape == (4000, 6, 1, 1, 1) and level.shape == (4000,)
    share = {key: frames_of(mask).count(list(key)) / 4000 for key in ((0, 5), (0,), (0, 1, 2), ())}
    assert sum(share.values()) == 1
    for key, expected in {(0, 5): 0.2, (0,): 0.25, (0, 1, 2): 0.25, (): 0.3}.items():
        assert abs(share[key] - expected) < 0.03, key
    assert level.unique().tolist() == list(range(50))
    again, _ = draw_known(config, 4000, 6, seeded())
    assert torch.equal(mask, again)


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="their sum must be at most 1"):
        KnownFramesConfig(interpolation=0.9)
    with pytest.raises(ValueError, match=r"previous is \(\)"):
        KnownFramesConfig(previous=())
    with pytest.raises(ValueError, match="max_level"):
        KnownFramesConfig(max_level=0)
    with pytest.raises(ValueError, match="previous has 3, of clips with 3 frames"):
        known_mask(KnownFramesConfig(), torch.zeros(1), torch.tensor([3]), 3)
    with pytest.raises(ValueError, match="level"):
        ClipsConfig(level=1000)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_known_frames_stand_at_their_own_level_with_their_own_noise(kind: Any) -> None:
    objective = make_objective(ObjectiveConfig(kind=kind))
    x0, eps, own = (video(2, 4, 3, 2, 2, seed=s) for s in range(3))
    t, level = (objective.from_timestep(torch.tensor(y)) for y in ([700.0, 300.0], [100.0, 20.0]))
    mask = torch.zeros(2, 4, 1, 1, 1)
    mask[0, 0], mask[1, [0, 3]] = 1, 1
    x, target = training_pair(objective, x0, t, level, mask, eps, own)
    assert x.shape == (2, 4, 4, 2, 2) and torch.equal(x[:, :, 3:], mask.expand(-1, -1, 1, 2, 2).double())
    for row, given in ((0, [0]), (1, [0, 3])):
        for frame in range(4):
            at, noise = (level, own) if frame in given else (t, eps)
            assert torch.equal(x[row, frame, :3], objective.noise(x0, at, noise)[row, frame])
            assert torch.equal(target[row, frame], objective.target(x0, noise, at)[row, frame])


def test_the_loss_is_the_mean_absolute_error_of_all_frames() -> None:
    pred, target = video(2, 4, 3, 2, 2), video(2, 4, 3, 2, 2, seed=1)
    expected = torch.stack([(p - t).abs().mean() for p, t in zip(pred, target, strict=True)])
    torch.testing.assert_close(per_sample_l1(pred, target), expected)
    with pytest.raises(ValueError, match="they must be equal"):
        per_sample_l1(pred, target[:, :1])


# ---- sampling ----------------------------------------------------------------------------------------------


class Copying:
    """The exact network of still videos: x0 is the first known frame, or nothing is known and it is zero."""

    def __init__(self, objective: EpsObjective) -> None:
        self.objective = objective
        self.calls: list[tuple[Tensor, Known | None]] = []

    def __call__(self, x: Tensor, t: Tensor, known: Known | None) -> Tensor:
        self.calls.append((x, known))
        still = torch.zeros_like(x[:, :1]) if known is None else x[:, :1]
        a, s = (self.objective.schedule.at(name, t, x) for name in ("alpha", "sigma"))
        return (x - a * still) / s


def sampler(steps: int = 5, model: ClipModel | None = None, eta: float = 0.0, **options: Any) -> ClipSampler:
    objective = make_objective(ObjectiveConfig())
    assert isinstance(objective, EpsObjective)
    config = ClipsConfig(**{"guidance": 0.0, **options})
    path = DDIMPath.of(objective.schedule.respace(str(steps)))
    generator = seeded(5)

    def run(model: Model, noise: Tensor) -> Tensor:
        return sample_along(path, model, noise, eta, generator)[-1]

    return ClipSampler(model or Copying(objective), objective, run, config, generator)


def test_a_still_video_goes_on() -> None:
    first = video(2, 1, 3, 2, 2).expand(-1, 4, -1, -1, -1)
    made = predict_frames(sampler(level=0), first, clips=3)
    assert made.shape == (2, 4 + 3 * 3, 3, 2, 2)
    assert (made - first[:, :1]).abs().max() < 0.15, "but for the noise of level 0 in each clip"
    assert torch.equal(made[:, :4], first)
    overlapping = predict_frames(sampler(level=0, overlap=3), first, clips=2)
    assert overlapping.shape[1] == 4 + 2 and (overlapping - first[:, :1]).abs().max() < 0.15
    with pytest.raises(ValueError, match=r"clips.overlap is 4, of clips with 4 frames"):
        predict_frames(sampler(overlap=4), first, clips=1)


def test_a_clip_is_completed_around_any_frames() -> None:
    still = video(2, 1, 3, 2, 2).expand(-1, 4, -1, -1, -1)
    mask = torch.zeros(2, 4, 1, 1, 1)
    mask[0, 0] = mask[1, [0, 2]] = 1
    made = sampler(level=0).complete(still * mask, mask)
    assert torch.equal(made * mask, still * mask) and (made - still).abs().max() < 0.15


def test_known_frames_come_back_before_each_prediction() -> None:
    run = sampler(steps=4, level=100, eta=1.0, overlap=2)
    run.extend(video(2, 4, 3, 2, 2))
    inputs = [x for x, _ in run.model.calls]  # type: ignore[attr-defined]
    assert len(inputs) == 4
    assert all(torch.equal(x[:, :2], inputs[0][:, :2]) for x in inputs), "noised once for the clip"
    assert all(not torch.equal(x[:, 2:], inputs[0][:, 2:]) for x in inputs[1:])


@pytest.mark.parametrize("released", [False, True])
def test_the_mask_says_which_frames_are_given_as_in_training(released: bool) -> None:
    """The released code tells the prediction model that all are."""
    run = sampler(steps=1, released=released)
    run.extend(video(2, 4, 3, 2, 2))
    run.fill(video(2, 1, 3, 2, 2), video(2, 1, 3, 2, 2, seed=1), frames=5)
    (_, extended), (_, filled) = run.model.calls  # type: ignore[attr-defined]
    assert extended.timestep.tolist() == [100, 100]
    assert extended.shown[0].flatten().tolist() == ([1, 1, 1, 1] if released else [1, 0, 0, 0])
    assert extended.mask[0].flatten().tolist() == [1, 0, 0, 0]
    assert filled.shown[0].flatten().tolist() == [1, 0, 0, 0, 1]


def test_guidance_moves_away_from_the_prediction_without_mask_and_level() -> None:
    run, plain = sampler(guidance=0.5), sampler()
    known = run.lay(video(2, 1, 3, 2, 2), mask := torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1, 1), mask)
    x, t = put_frames(video(2, 3, 3, 2, 2, seed=1), known.x, known.mask), torch.tensor([500, 500])
    e, without = plain.predict(x, t, known), plain.predict(x, t, None)
    torch.testing.assert_close(run.predict(x, t, known), e + 0.5 * (e - without))
    (told, mask_of_it), (bare, none) = run.model.calls  # type: ignore[attr-defined]
    assert mask_of_it is known and none is None
    assert torch.equal(told, bare), "both see the known frames"
    torch.testing.assert_close(run.predict(x, t, None), without)


def test_every_gap_is_filled_and_sparse_frames_stay() -> None:
    sparse = video(2, 4, 3, 2, 2)
    full = interpolate_frames(sampler(), sparse, frames=5)
    assert full.shape[1] == 3 * 4 + 1 and torch.equal(full[:, ::4], sparse)
    released = interpolate_frames(sampler(released=True), sparse, frames=5)
    assert released.shape[1] == 5 and torch.equal(released, full[:, :5])


def test_a_plan_reaches_its_length() -> None:
    for frames in range(2, 60):
        for filled in (2, 4, 6):
            sparse = sparse_frames(frames, filled)
            assert (sparse - 2) * (filled - 1) + 1 < frames <= (sparse - 1) * (filled - 1) + 1
            for clip, overlap in ((4, 1), (5, 2)):
                more = continuations(sparse, clip, overlap)
                assert clip + more * (clip - overlap) >= sparse
                assert more == 0 or clip + (more - 1) * (clip - overlap) < sparse
            assert continuations(frames, frames, overlap=frames) == 0
            with pytest.raises(ValueError, match=r"clips.overlap is 3, of clips with 3 frames"):
                continuations(frames + 3, 3, overlap=3)
            assert windows(sparse) == sparse - 1 and windows(sparse + 3, released=True) == -(-sparse // 3)


def test_eta_adds_noise_and_keeps_the_level() -> None:
    """The variance of a step is that of the level it reaches: read off with one input at a time."""
    objective = make_objective(ObjectiveConfig())
    assert isinstance(objective, EpsObjective)
    path = DDIMPath.of(objective.schedule.respace("10"))
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for i in range(len(path)):
        level = path.levels[i + 1]
        x = (1 - level).sqrt() * one  # x_t of x0 = 0 and eps = 1
        kept, fresh = path.denoise(i, x, one, 1.0, none), path.denoise(i, none, none, 1.0, one)
        torch.testing.assert_close(kept.square() + fresh.square(), (1 - path.levels[i]).reshape(1))
        assert torch.equal(path.denoise(i, x, one, 0.0, one), path.denoise(i, x, one))


def test_the_mask_is_a_channel() -> None:
    mask = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1, 1)
    x = network_input(video(1, 2, 3, 4, 5), mask)
    assert x.shape == (1, 2, 4, 4, 5) and x[0, 0, 3].all() and not x[0, 1, 3].any()
