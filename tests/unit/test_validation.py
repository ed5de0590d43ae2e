"""Validation while training: what is measured, that training is untouched by it, and its lines in the log."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dit_booth.config import StageConfig, TrainConfig
from dit_booth.data.example import collate
from dit_booth.diffusion import ObjectiveConfig, make_objective
from dit_booth.sampling.validation import FEW_STEPS, identity_curve, identity_scores, in_few_steps
from dit_booth.testing import Trial, trial
from dit_booth.training.distributed import Ranks
from dit_booth.training.ema import Ema
from dit_booth.training.metrics_logger import MetricsLogger
from dit_booth.training.validation import BINS, Validation, shares, untouched

torch.set_num_threads(1)
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
PARTS = ["loss_0.0-0.2", "loss_0.2-0.4", "loss_0.4-0.6", "loss_0.6-0.8", "loss_0.8-1.0"]


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone, which averages over ranks need."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def validated(run: Trial, rows: int = 2, stage: StageConfig | None = None, **train: Any) -> Validation:
    config = run.components.config
    run.components.config = replace(config, train=TrainConfig(validate_every=1, **train))
    built = Validation.build(
        run.components, stage or StageConfig(drop=1.0), ALONE, torch.float32, rows, identity_curve
    )
    assert built is not None
    return built


# ---- what is measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_ranks_share_the_examples_in_as_many_batches_each(count: int, world: int, rows: int) -> None:
    ranks = [list(shares(count, Ranks(rank, world, CPU), rows)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(0 < len(own) <= rows for own, _ in chain(*ranks)), "every batch can be run"
    counted = [own[:n] for own, n in chain(*ranks)]
    assert sorted(chain(*counted)) == list(range(count)), "each example counts once"


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_a_bin_has_the_loss_in_its_part_of_the_range_of_t_and_the_others_noise(kind: Any) -> None:
    run = trial("kv_concat", objective=ObjectiveConfig(kind=kind))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    run.model.register_forward_hook(lambda _, inputs, made: seen.append((*inputs[:2], made.output)))
    losses = validated(run, rows=4, validate_examples=4).losses()
    assert list(losses) == ["loss", *PARTS]
    assert losses["loss"] == pytest.approx(sum(losses[name] for name in PARTS) / BINS)
    assert len(seen) == BINS
    dataset = run.components.dataset("dev")
    x0 = run.components.autoencoder.encode(collate([dataset[i] for i in range(4)]).video)
    objective, noises = run.components.objective, list[Tensor]()
    for part, (x_t, timestep, output) in enumerate(seen):
        share = timestep / (999 if kind == "flow" else 1000)
        assert share.tolist() == pytest.approx([(part + (i + 0.5) / 4) / BINS for i in range(4)], abs=1e-3)
        level = objective.from_timestep(timestep)
        clean, noise = (
            objective.noise(x0, level, torch.zeros_like(x0)),
            objective.noise(torch.zeros_like(x0), level, torch.ones_like(x0)),
        )
        noises.append((x_t - clean) / noise)
        expected = objective.loss(output, x0, noises[-1], level).mean().item()
        assert losses[PARTS[part]] == pytest.approx(expected, rel=1e-3)
    assert all(torch.allclose(noises[0], other, atol=2e-3) for other in noises[1:])
    assert not torch.allclose(noises[0][0], noises[0][1], atol=0.1), "each example has its own"


def test_the_loss_depends_on_no_batch() -> None:
    run = trial("kv_concat").perturb()
    by_twos, at_once = (validated(run, rows, validate_examples=5).losses() for rows in (2, 8))
    assert by_twos == pytest.approx(at_once, rel=1e-5)


def test_nothing_is_dropped() -> None:
    run = trial("kv_concat").perturb()
    dropping, keeping = (
        validated(run, stage=StageConfig(drop=drop), validate_examples=3).losses() for drop in (1.0, 0.0)
    )
    assert dropping == keeping


def test_a_stage_of_single_frames_without_image_has_losses_and_no_identity() -> None:
    run = trial("none")
    run.model.active = ()
    stage = StageConfig(single_frames=True, frames=2)
    values = validated(run, stage=stage, validate_examples=3).measure(None)
    assert list(values) == ["loss", *PARTS]
    assert all(0 < value < 1e6 for value in values.values())


def test_without_validation_no_data_set_is_opened() -> None:
    run = trial("kv_concat")
    assert run.components.config.train.validate_every == 0
    assert Validation.build(run.components, StageConfig(), ALONE, torch.float32, 2, None) is None


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_shares_of_the_range_of_t_run_from_data_to_noise(kind: Any) -> None:
    objective = make_objective(ObjectiveConfig(kind=kind))
    levels = objective.t_at(torch.tensor([0.0, 0.25, 0.5, 1 - 1e-6]))
    timesteps = objective.timestep(levels)
    assert timesteps.tolist() == pytest.approx([0, 250, 500, 999], abs=1)
    assert levels.dtype == objective.sample_t(1, torch.Generator()).dtype


# ---- the identity curve ------------------------------------------------------------------------------------


def test_identity_is_measured_on_samples_of_the_prompts_and_repeats() -> None:
    run = trial("kv_concat").perturb()
    run.components.config = replace(run.components.config, train=TrainConfig(validate_prompts=2))
    dataset = run.components.dataset("dev")
    first = identity_curve(run.components, dataset, ALONE)
    torch.rand(3)  # other draws before it change nothing
    assert identity_curve(run.components, dataset, ALONE) == first
    assert list(first) == ["palette", "own_i"]
    assert first["palette"] > 0
    assert -1 <= first["own_i"] <= 1
    run.components.config = replace(run.components.config, train=TrainConfig(validate_prompts=0))
    assert identity_curve(run.components, dataset, ALONE) == {}


def test_the_right_subject_scores_better() -> None:
    run = trial("kv_concat")
    dataset = run.components.dataset("dev")
    right, wrong = dataset[0], dataset[1]
    ours, theirs = (identity_scores(run.components, right, video) for video in (right.video, wrong.video))
    assert ours["palette"] < theirs["palette"]
    still = identity_scores(run.components, right, right.image.expand(2, -1, -1, -1))
    assert still["own_i"] == pytest.approx(1)


def test_a_diverged_network_scores_nan() -> None:
    run = trial("kv_concat")
    example = run.components.dataset("dev")[0]
    scores = identity_scores(run.components, example, torch.full_like(example.video, torch.nan))
    assert all(value != value for value in scores.values())


def test_other_data_than_the_toy_worlds_has_no_palette() -> None:
    run = trial("kv_concat")
    example = replace(run.components.dataset("dev")[0], identity=None)
    assert list(identity_scores(run.components, example, example.video)) == ["own_i"]


def test_sampling_takes_few_steps() -> None:
    sampler = trial("kv_concat").components.config.sampler
    assert in_few_steps(replace(sampler, steps=3)).steps == 3
    long = in_few_steps(replace(sampler, steps=45, spacing="10,15,20"))
    assert (long.steps, long.spacing) == (FEW_STEPS, "even")


# ---- training is untouched ---------------------------------------------------------------------------------


def test_weights_modes_and_generators_are_as_before() -> None:
    run = trial("kv_concat").perturb()
    run.model.train()
    run.model.text.eval()
    modes = [module.training for module in run.model.modules()]
    parameters = run.train_in("fine")
    ema = Ema(parameters, 0.9)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    state = torch.random.get_rng_state()
    validation = validated(run, validate_examples=2, validate_prompts=1)
    averaged, trained = validation.measure(ema), validation.measure(None)
    assert averaged != trained, "the averages were measured"
    assert torch.equal(state, torch.random.get_rng_state())
    assert modes == [module.training for module in run.model.modules()]
    assert len(set(modes)) == 2
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.grad is None


def test_averages_stand_in_for_a_while_and_leave_if_something_fails() -> None:
    parameter = nn.Parameter(torch.randn(5).bfloat16())
    ema = Ema({"p": parameter}, 0.9)
    with torch.no_grad():
        parameter.mul_(3)
    trained = parameter.detach().clone()
    with pytest.raises(ValueError, match="of the caller"), ema.in_place():
        assert torch.equal(parameter, ema.shadow["p"].bfloat16())
        raise ValueError("of the caller")
    assert torch.equal(parameter, trained)


def test_a_failure_leaves_modes_and_generators() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="of the caller"), untouched(model, CPU):
        torch.rand(1)
        assert not model[0].training
        raise ValueError("of the caller")
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert torch.equal(state, torch.random.get_rng_state())


# ---- the log -----------------------------------------------------------------------------------------------

STEP = {"loss": 0.5, "aux_loss": 0.0, "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.1}


def lines(folder: Path) -> list[tuple[int, bool]]:
    """The step of each line, and if it is a validation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], "validation" in row) for row in rows]


def begun(folder: Path, stage: Path, done: int) -> MetricsLogger:
    for path in (folder, stage):
        path.mkdir(exist_ok=True)
    logger = MetricsLogger(folder, 0.0)
    logger.begin("fine", stage, done)
    return logger


def test_a_resumed_stage_drops_the_validations_after_its_checkpoint(tmp_path: Path) -> None:
    logger = begun(tmp_path / "run", tmp_path / "stage", 0)
    for step in (1, 2, 3, 4):
        logger.step("fine", step, STEP)
        if step % 2 == 0:
            logger.validation("fine", step, {"loss": 0.25 * step, "palette": 3.0}, 7.0)
    assert logger.seconds == pytest.approx(4 * 0.1 + 2 * 7.0)
    every = [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert lines(tmp_path / "run") == lines(tmp_path / "stage") == every
    begun(tmp_path / "run", tmp_path / "stage", 3).close()
    assert lines(tmp_path / "run") == lines(tmp_path / "stage") == every[:4]


def test_a_run_that_takes_over_a_stage_takes_over_its_validations(tmp_path: Path) -> None:
    logger = begun(tmp_path / "one", tmp_path / "stage", 0)
    logger.step("fine", 1, STEP)
    logger.validation("fine", 1, {"loss": 0.25, "palette": 3.0}, 7.0)
    logger.close()
    begun(tmp_path / "two", tmp_path / "stage", 1).close()
    assert lines(tmp_path / "two") == [(1, False), (1, True)]
    for name in ("one", "two"):
        board = EventAccumulator(str(tmp_path / name / "tensorboard"))
        board.Reload()
        tags = {f"validation/fine/{n}" for n in ("loss", "palette", "seconds")} | {f"fine/{n}" for n in STEP}
        assert set(board.Tags()["scalars"]) == tags
        (scalar,) = board.Scalars("validation/fine/loss")
        assert (scalar.step, scalar.value) == (1, 0.25)
