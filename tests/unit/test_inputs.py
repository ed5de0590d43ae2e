"""From a batch to the inputs of one training step: dropping, times, noise, single frames."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from einops import rearrange

from dit_booth.components import Components, build
from dit_booth.config import DataConfig, RunConfig, StageConfig
from dit_booth.data.example import Batch, collate
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import NULL_PROMPT
from dit_booth.training.address import stages_of
from dit_booth.training.inputs import Inputs, generator_of, make_inputs, with_length

torch.set_num_threads(1)
BATCH, FRAMES = 6, 3


@cache
def parts_of(kind: Any = "eps") -> Components:
    config = RunConfig(
        strategy="none",
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=12, frames=FRAMES),
        objective=ObjectiveConfig(kind=kind),
    )
    return build(config)


@cache
def batch() -> Batch:
    data = parts_of().config.data.build()
    return collate([data[i] for i in range(BATCH)])


def inputs(
    drop: float = 0.0, seed: int = 0, kind: str = "eps", image: bool = True, single: bool = False
) -> Inputs:
    stage = StageConfig(drop=drop, single_frames=single)
    return make_inputs(parts_of(kind), batch(), stage, generator_of(seed), torch.float32, image)


# ---- frames ------------------------------------------------------------------------------------------------


def frames_at(stage: StageConfig, generator: Any) -> list[int]:
    """Return the first frame of each row in its video; assert that its frames are consecutive ones of the video."""
    whole = parts_of().autoencoder.encode(batch().video)
    x0 = make_inputs(parts_of(), batch(), stage, generator, torch.float32, True).x0
    windows = whole.unfold(1, x0.shape[1], 1).movedim(-1, 2)  # b start f c h w
    same = (windows == x0.unsqueeze(1)).flatten(2).all(-1)
    assert bool(same.any(1).all())
    return same.int().argmax(1).tolist()


def test_a_stage_of_fewer_frames_takes_them_in_a_row_from_a_random_one() -> None:
    found = [frames_at(StageConfig(frames=2), generator_of(seed)) for seed in range(8)]
    assert {start for starts in found for start in starts} == {0, 1}
    assert found[0] == frames_at(StageConfig(frames=2), generator_of(0))
    assert frames_at(StageConfig(frames=FRAMES), generator_of(0)) == [0] * BATCH
    own = frames_at(StageConfig(frames=2), [generator_of(row) for row in range(BATCH)])
    other = frames_at(StageConfig(frames=2), [generator_of(row + 9 * (row > 2)) for row in range(BATCH)])
    assert own[:3] == other[:3], "a row's frames depend on its own generator alone"


def test_more_frames_than_there_are_are_all() -> None:
    assert frames_at(StageConfig(frames=FRAMES + 1), generator_of(0)) == [0] * BATCH
    with pytest.raises(ValueError, match="frames is -1; use a whole number"):
        StageConfig(frames=-1)


# ---- randomness --------------------------------------------------------------------------------------------


def test_generator_of_is_a_pure_function_of_its_numbers() -> None:
    def draw(*numbers: int) -> list[float]:
        return torch.rand(4, generator=generator_of(*numbers)).tolist()

    torch.manual_seed(1)
    first = draw(0, 1, 2, 3)
    torch.manual_seed(2)
    torch.rand(7)
    assert draw(0, 1, 2, 3) == first
    others = [(0, 1, 2, 4), (1, 1, 2, 3), (0, 1, 3, 2), (0, 1, 2), (0, 1, 2, 3, 1)]
    assert len({tuple(draw(*n)) for n in others} | {tuple(first)}) == 1 + len(others)


def test_inputs_are_a_pure_function_of_the_generator() -> None:
    one, again, other = inputs(0.5), inputs(0.5), inputs(0.5, seed=1)
    assert one.reference is not None and again.reference is not None
    for field in ("x_t", "timestep", "eps", "t"):
        assert torch.equal(getattr(one, field), getattr(again, field))
        assert not torch.equal(getattr(one, field), getattr(other, field))
    assert torch.equal(one.reference.noisy, again.reference.noisy)
    assert torch.equal(one.prompt.ids, again.prompt.ids)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("single", [False, True])
def test_a_row_with_a_generator_of_its_own_is_the_same_in_every_batch(kind: str, single: bool) -> None:
    """Hence the same on one rank and on several, which share a batch."""

    def made(rows: range) -> Inputs:
        data, stage = parts_of().config.data.build(), StageConfig(drop=0.5, single_frames=single)
        some = collate([data[i] for i in rows])
        draws = [generator_of(0, i) for i in rows]
        return make_inputs(parts_of(kind), some, stage, draws, torch.float32, with_image=not single)

    whole, halves = made(range(4)), [made(range(2)), made(range(2, 4))]
    for field in ("x_t", "timestep", "eps", "t"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(half, field) for half in halves]))
    assert torch.equal(whole.prompt.ids, torch.cat([half.prompt.ids for half in halves]))
    if not single:
        assert torch.equal(whole.reference.noisy, torch.cat([half.reference.noisy for half in halves]))
    assert whole.eps.flatten(1).unique(dim=0).shape[0] == len(whole.eps), "every row has noise of its own"


# ---- dropping ----------------------------------------------------------------------------------------------


def test_nothing_is_dropped_at_zero() -> None:
    made, text = inputs(0.0), parts_of().model.text
    expected = text.tokenize(batch().captions, batch().subjects)
    assert torch.equal(made.prompt.ids, expected.ids)
    assert torch.equal(made.prompt.spans, expected.spans)
    assert made.prompt.spans.any(dim=1).all(), "every caption has its subject"
    assert torch.equal(made.reference.image, batch().image)


def test_everything_is_dropped_at_one() -> None:
    made = inputs(1.0)
    null = parts_of().model.text.tokenize([NULL_PROMPT] * BATCH)
    assert torch.equal(made.prompt.ids, null.ids)
    assert not made.prompt.spans.any()
    assert not made.reference.image.any()
    assert not made.reference.latent.any(), "the latent of a zero image (pixel autoencoder)"
    zero = parts_of().image_encoder(torch.zeros_like(batch().image))
    assert torch.equal(made.reference.embedding, zero.embedding)


def test_text_and_image_are_dropped_together_at_the_rate() -> None:
    null = parts_of().model.text.tokenize([NULL_PROMPT]).ids
    count = 0
    for seed in range(20):
        made = inputs(0.3, seed=seed)
        no_text = (made.prompt.ids == null).all(1)
        assert torch.equal(no_text, ~made.reference.image.flatten(1).any(1))
        assert torch.equal(no_text, ~made.prompt.spans.any(1))
        count += int(no_text.sum())
    assert 0.15 < count / (20 * BATCH) < 0.45


def test_text_and_image_are_also_dropped_each_alone() -> None:
    """Shares of rows that exclude each other; the rows that lose both stay those that they were without the others."""
    null = parts_of().model.text.tokenize([NULL_PROMPT]).ids
    stage, counts = StageConfig(drop=0.2, drop_image=0.3, drop_text=0.1), {(True, True): 0}
    for seed in range(40):
        made = make_inputs(parts_of(), batch(), stage, generator_of(seed), torch.float32, True)
        no_text, no_image = (made.prompt.ids == null).all(1), ~made.reference.image.flatten(1).any(1)
        assert torch.equal(no_image, ~made.reference.present)
        before = (inputs(0.2, seed=seed).prompt.ids == null).all(1)
        assert torch.equal(no_text & no_image, before)
        for pair in zip(no_text.tolist(), no_image.tolist(), strict=True):
            counts[pair] = counts.get(pair, 0) + 1
    shares = {pair: count / (40 * BATCH) for pair, count in counts.items()}
    expected = {(True, True): 0.2, (False, True): 0.3, (True, False): 0.1, (False, False): 0.4}
    assert all(abs(shares[pair] - share) < 0.08 for pair, share in expected.items()), shares


# ---- noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_the_video_is_noised_to_its_time(kind: str) -> None:
    made, objective = inputs(kind=kind), parts_of(kind).objective
    assert torch.equal(made.x0, parts_of().autoencoder.encode(batch().video))
    target = objective.target(made.x0, made.eps, made.t)
    assert (objective.to_x0(target, made.x_t, made.t) - made.x0).abs().max() < 1e-2
    assert (objective.to_eps(target, made.x_t, made.t) - made.eps).abs().max() < 1e-3
    assert torch.equal(made.timestep, objective.timestep(made.t))
    assert made.t.unique().numel() > 1


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_the_reference_is_noised_to_the_videos_own_time(kind: str) -> None:
    """Its noise follows from the closed form at the video's t, is standard normal, and is drawn before the video's."""
    made, objective = inputs(kind=kind), parts_of(kind).objective
    reference = made.reference
    draw = generator_of(0)
    torch.rand(BATCH, generator=draw)
    t = objective.sample_t(BATCH, draw)
    first, second = (torch.randn(x.shape, generator=draw) for x in (reference.latent, made.x0))
    assert torch.equal(t, made.t)
    assert torch.equal(second, made.eps)
    target = objective.target(reference.latent, first, made.t)
    assert (objective.to_eps(target, reference.noisy, made.t) - first).abs().max() < 1e-3
    if kind == "eps":
        alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[made.t]
        a, s = (rearrange(v, "b -> b 1 1 1 1") for v in (alphas.sqrt(), (1 - alphas).sqrt()))
        assert (reference.noisy - (a * reference.latent + s * first)).abs().max() < 1e-5
    assert torch.equal(reference.latent, parts_of().autoencoder.encode(batch().image.unsqueeze(1)))


def test_the_reference_changes_nothing_before_the_videos_noise() -> None:
    """A run without an image has the same drops and times as one with it."""
    with_image, without = inputs(0.5), inputs(0.5, image=False)
    assert without.reference is None
    assert torch.equal(with_image.t, without.t)
    assert torch.equal(with_image.prompt.ids, without.prompt.ids)


def test_dtype_is_the_networks() -> None:
    made = make_inputs(parts_of(), batch(), StageConfig(), generator_of(0), torch.bfloat16, True)
    assert made.x_t.dtype == made.reference.noisy.dtype == made.reference.embedding.dtype == torch.bfloat16
    assert all(s.dtype == torch.bfloat16 for s in made.reference.states)
    assert made.x0.dtype == made.eps.dtype == torch.float32, "the loss's target keeps its precision"


# ---- single frames -----------------------------------------------------------------------------------------


def test_single_frames_become_videos_with_times_of_their_own() -> None:
    made, whole = inputs(image=False, single=True), inputs(image=False)
    assert made.x_t.shape == (BATCH * FRAMES, 1, *whole.x_t.shape[2:])
    assert torch.equal(made.x0, rearrange(whole.x0, "b f c h w -> (b f) 1 c h w"))
    for i in range(BATCH * FRAMES):
        assert torch.equal(made.prompt.ids[i], whole.prompt.ids[i // FRAMES])
        assert torch.equal(made.prompt.spans[i], whole.prompt.spans[i // FRAMES])
    times = rearrange(made.t, "(b f) -> b f", f=FRAMES)
    assert all(row.unique().numel() > 1 for row in times)
    assert len(made.t) == len(made.timestep) == len(made.eps) == BATCH * FRAMES
    assert torch.equal(parts_of().objective.noise(made.x0, made.t, made.eps), made.x_t)


def test_single_frames_with_an_image_are_an_error() -> None:
    with pytest.raises(ValueError, match="single_frames is for stages without an image"):
        inputs(single=True)


def test_a_reference_holds_the_images_encodings() -> None:
    components = parts_of()
    made, seen = components.reference(batch().image, torch.float32), components.image_encoder(batch().image)
    assert len(made.states) == 5
    assert all(torch.equal(a, b) for a, b in zip(made.states, seen.states, strict=True))
    assert made.noisy is None, "until it is noised"
    assert torch.equal(components.copies(made), made.latent), "one copy unless a strategy needs more"
    assert made.latent.shape == (BATCH, 1, 27, 4, 4)


# ---- several lengths -----------------------------------------------------------------------------------------------


def test_each_step_draws_one_of_the_lengths_for_all_its_videos() -> None:
    stage = StageConfig(frames=(1, 2, 0))
    drawn = [with_length(stage, 0, 0, step).frames for step in range(60)]
    assert set(drawn) == {1, 2, 0} and drawn == [with_length(stage, 0, 0, step).frames for step in range(60)]
    assert drawn != [with_length(stage, 1, 0, step).frames for step in range(60)]
    assert min(drawn.count(length) for length in (1, 2, 0)) > 8
    for length in (1, 2, 0):
        one = replace(stage, frames=length)
        made = make_inputs(parts_of(), batch(), one, generator_of(0), torch.float32, False)
        assert made.x_t.shape[1] == (length or batch().video.shape[1])
    single = StageConfig(frames=2)
    assert with_length(single, 0, 0, 5) is single and stage.frames_of(8) == 8 and single.frames_of(8) == 2


@pytest.mark.parametrize(
    ("frames", "says"),
    [((2, 2), "give one number, or several"), ((), "give one number"), ((-1, 2), "use a whole")],
)
def test_lengths_that_cannot_be(frames: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StageConfig(frames=frames)


def test_lengths_change_an_address_only_where_they_are_used() -> None:
    runs = [RunConfig.create(strategy="kv_concat", stages={"fine": {"frames": n}}) for n in (0, 2, [2, 4])]
    assert runs[2].stages.fine.frames == (2, 4) and RunConfig.create(runs[2].as_dict()) == runs[2]
    addresses = [[stage.address for stage in stages_of(run)] for run in runs]
    assert len({tuple(each) for each in addresses}) == 3
    assert runs[0].as_dict()["stages"]["fine"]["frames"] == 0, "as it was before there were several"
