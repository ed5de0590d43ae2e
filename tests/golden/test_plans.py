"""What the bare attentions of the original codes are sensitive to; that ours equal them: `attention_cases`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import Original
from cases import FLOAT32, worst
from einops import repeat
from files import has, load

from dit_booth.attention import FramePlan, Segment, attend

torch.set_num_threads(1)


def error(name: str, output: str, **changes: object) -> float:
    """Our error on an output when a recipe is changed."""
    info, tensors = load(name)
    original = Original(info, tensors, output)
    original.recipe = replace(original.recipe, **changes)  # type: ignore[arg-type]
    return worst(original.ours(), tensors[f"outputs.{output}"])


@pytest.mark.parametrize("plan", ["self+first", "first", "self", "all"])
def test_tune_a_video_reads_first_and_previous_and_nothing_else(plan: str) -> None:
    assert error("tune_a_video", "out", plan=plan) > 100 * FLOAT32
    assert error("tune_a_video", "block", plan=plan) > 100 * FLOAT32


@pytest.mark.skipif(not has("text2video_zero"), reason="golden file text2video_zero is not here")
def test_text2video_zero_reads_the_first_frame_only() -> None:
    assert error("text2video_zero", "self", plan="first+previous") > 100 * FLOAT32


def test_videobooth_reads_the_reference_where_there_is_one() -> None:
    assert error("videobooth_attention", "fine", image=False) > 100 * FLOAT32
    assert error("videobooth_attention", "none", image=True) > 100 * FLOAT32


def test_the_text_attention_of_the_coarse_stage_has_its_own_keys_and_values() -> None:
    info, tensors = load("videobooth_attention")
    without = {k: x for k, x in tensors.items() if "_global" not in k}
    assert worst(Original(info, without, "cross").ours(), tensors["outputs.cross"]) > 100 * FLOAT32


def test_repeated_keys_change_nothing() -> None:
    """Why ``first+previous`` may drop the repeat of frame 0 that Tune-A-Video's frames 0 and 1 read twice."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 2, 8, generator=generator, dtype=torch.float64)
    twice = torch.softmax(
        torch.einsum("bfnkd,bmkd->bfknm", q, repeat(k[:, 0], "b m k d -> b (r m) k d", r=2)) * 8**-0.5, -1
    )
    expected = torch.einsum("bfknm,bmkd->bfnkd", twice, repeat(v[:, 0], "b m k d -> b (r m) k d", r=2))
    assert (attend(q, [Segment(k, v, FramePlan("first+previous").frames(2))]) - expected).abs().max() < 1e-12
