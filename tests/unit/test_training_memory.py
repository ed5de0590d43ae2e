"""Memory of training (`dit-booth describe`): what is counted, and the arithmetic of ZeRO."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_booth.commands.describe import parse_network
from dit_booth.config import RunConfig
from dit_booth.config.parse import parse
from dit_booth.cost.describe import Encoders, table_of_run
from dit_booth.training.memory import GIB, LiveBytes, StageMemory, Way, activations, fitting, step_bytes

torch.set_num_threads(1)
LATENTS = (4, 8, 8)
ENCODERS = Encoders(text=16, tokens=5, image=12, patches=5, common=8)


def test_live_bytes_of_known_sizes() -> None:
    before = torch.zeros(1000)
    with LiveBytes() as counter:
        a = torch.zeros(1000)
        view = a.view(10, 100)[2:]
        a.mul_(2)
        assert (counter.live, counter.peak) == (4000, 4000), "views and in-place results share their storage"
        b = before + a
        assert counter.live == 8000, "what was there before counts as nothing"
        del a
        assert counter.live == 8000, "a view keeps its storage"
        del view
        assert counter.live == 4000
        c = torch.zeros(100, dtype=torch.bfloat16)
        assert (counter.live, counter.peak) == (4200, 8000)
        del b, c
    assert counter.live == 0


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """A tiny Wan."""
    flags = "--backbone wan --wan.depth 2 --wan.hidden 32 --wan.heads 2 --wan.ffn 64 --data.frames 3"
    return parse([*flags.split(), "--strategy", "kv_concat", "--stages.fine.frames", "0"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_step_has_the_bytes_of_a_real_one(config: RunConfig, checkpointing: bool) -> None:
    run = replace(config, wan=replace(config.wan, checkpointing=checkpointing))
    dry, real = (step_bytes(run, LATENTS, 0, ENCODERS, device) for device in ("meta", "cpu"))
    assert dry == real > 0


def test_a_block_more_is_as_many_bytes_more(config: RunConfig) -> None:
    """The extrapolation from networks of four and five blocks, which recompute."""
    step_bytes(config, LATENTS, 0, ENCODERS)  # tables that are kept from the first step on
    deep = replace(config, wan=replace(config.wan, depth=6, checkpointing=True))
    assert activations(deep, LATENTS, 0, ENCODERS, 6, True) == step_bytes(deep, LATENTS, 0, ENCODERS)


def test_zero_divides_what_its_stage_says() -> None:
    stage = StageMemory(name="fine", parameters=1000, trained=100, activations=50, recomputed=10)
    sizes = [stage.rank(4, Way(checkpointing=False, zero=zero), ema=False) for zero in (1, 2, 3)]
    assert sizes == [2000 + 300 + 200 + 50, 2000 + 300 + 50 + 50, 500 + 300 + 50 + 50]
    alone = [stage.rank(1, Way(checkpointing=False, zero=zero), ema=True) for zero in (1, 2, 3)]
    assert alone == [2000 + 400 + 1200 + 200 + 50] * 3
    assert stage.rank(4, Way(checkpointing=True, zero=3), ema=True) == 500 + 100 + 300 + 50 + 10
    with_text = replace(stage, text=7000)
    assert with_text.rank(4, Way(checkpointing=True, zero=3), ema=True) == 7000 + 500 + 100 + 300 + 50 + 10


def test_the_first_way_that_fits() -> None:
    stage = StageMemory(
        name="fine", parameters=GIB, trained=GIB, activations=30 * GIB, recomputed=GIB
    )  # 16 GiB on one GPU, and activations
    assert fitting(stage, 24, ema=False) == "; ".join(f"{n}: ZeRO 1 + recompute" for n in (1, 2, 4, 8))
    assert fitting(stage, 48, ema=False) == "1: ZeRO 1 + recompute; 2: ZeRO 1; 4: ZeRO 1; 8: ZeRO 1"
    huge = replace(stage, recomputed=30 * GIB)
    assert fitting(huge, 24, ema=False) == "; ".join(f"{n}: does not fit" for n in (1, 2, 4, 8))


def test_wan_has_1419_million_parameters() -> None:
    config, latents = parse_network(["--backbone", "wan", "--size", "1.3b", "--strategy", "none"])
    assert config is not None and latents == (16, 60, 104) and config.latent_frames == 21
    title, backbone = table_of_run(config, latents)
    assert title == "wan, 21 frames of 16 x 60 x 104 latents, one video"
    assert " 1419.00 M parameters" in backbone
