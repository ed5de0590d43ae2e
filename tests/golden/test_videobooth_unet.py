"""The video U-Net under VideoBooth's strategies where no golden file reaches; equality with those: `unet_cases`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from cases import FLOAT64, cast, worst
from files import load
from make_files import UNET_OUTPUTS, unet_file
from torch import Tensor
from unet_cases import RECIPES, Ours, cases, conditioning, dense_of, heads_of, produce, video

from dit_booth.models.unet.model import UNetConfig

torch.set_num_threads(1)
TINY = UNetConfig(
    channels=(8, 16, 16),
    layers_per_block=1,
    heads=2,
    norm_groups=4,
    text_dim=6,
    down_attention=(True, True, False),
)
STAGES = ("a_plain", "b_coarse", "c_fine_same_noise", "d_fine_own_noise")


# ---- every variant against the naive computation in float64 --------------------------------------------------------


@pytest.mark.parametrize(
    ("linear", "watermark", "size", "outputs"),
    [
        (False, False, (6, 9), STAGES),
        (False, True, (6, 9), STAGES),
        (True, False, (6, 9), STAGES),
        (True, True, (6, 9), UNET_OUTPUTS),
        (True, False, (8, 8), STAGES),
    ],
)
def test_every_variant_equals_a_dense_computation_in_float64(
    linear: bool, watermark: bool, size: tuple[int, int], outputs: tuple[str, ...]
) -> None:
    """Plain, coarse, fine, another time or no text of the reference's own, one frame, a batch, and guidance.

    The naive network computes the file's outputs, in float64.

    One variant has all of them, and so have the golden files; the others, which differ in a layer or a size, have one
    output of each stage.
    """
    config = replace(TINY, linear_projection=linear, watermark=watermark)
    results = list(cases(*unet_file(config, size=size, frames=3, batch=2, outputs=outputs)))
    double = [result for result in results if "float64" in result.name]
    assert len(double) == (20 if outputs == UNET_OUTPUTS else 2 * len(outputs))
    assert max(result.error for result in double) <= FLOAT64
    assert [result.name for result in results if not result.ok] == []


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_other_numbers_of_frames_levels_and_layers(frames: int) -> None:
    config = replace(
        TINY, channels=(12, 24), heads=3, norm_groups=6, layers_per_block=2, down_attention=(True, False)
    )
    outputs = ("a_plain", "b_coarse", "c_fine_same_noise", "d_fine_own_noise")
    results = list(cases(*unet_file(config, size=(5, 3), frames=frames, batch=3, outputs=outputs)))
    assert len(results) == 2 * 8
    assert [result.name for result in results if not result.ok] == []


def test_four_levels_at_a_size_that_nothing_divides() -> None:
    """As many as Stable Diffusion has: 9 x 13, 5 x 7, 3 x 4, 2 x 2, and up again to each of them."""
    config = replace(TINY, channels=(8, 8, 8, 8), down_attention=(True, True, True, False), watermark=True)
    outputs = ("a_plain", "b_coarse", "c_fine_same_noise", "e_cfg")
    results = list(cases(*unet_file(config, size=(9, 13), frames=2, batch=2, outputs=outputs)))
    double = [result for result in results if "float64" in result.name]
    assert len(double) == 7 and max(result.error for result in double) <= FLOAT64
    assert [result.name for result in results if not result.ok] == []


def test_variants_differ() -> None:
    """Each case is a case of its own: none is met by another's computation."""
    _, tensors = unet_file(TINY)
    whole = [
        k
        for k in tensors
        if k.startswith("outputs.") and tensors[k].shape == tensors["outputs.a_plain"].shape
    ]
    assert len(whole) == 9  # the cases of one video, and guidance's two
    for a, b in ((a, b) for a in whole for b in whole if a < b):
        assert worst(tensors[a], tensors[b]) > 1e-3, (a, b)


def test_heads_of_each_level_are_refused_with_a_reason() -> None:
    assert heads_of({"attention_head_dim": [8, 8]}) == 8 == heads_of({})
    with pytest.raises(ValueError, match="one number of heads for all levels"):
        heads_of({"attention_head_dim": [5, 10]})


# ---- the reference runs as one frame -------------------------------------------------------------------------------


Built = tuple[Ours, dict[str, Tensor]]
"""Ours and a file's tensors, in float64."""
VARIANTS = {
    "golden": lambda: load("videobooth_unet_l1"),
    "watermark": lambda: unet_file(replace(TINY, watermark=True), frames=4, outputs=()),
    "linear projection": lambda: unet_file(replace(TINY, linear_projection=True), frames=4, outputs=()),
}


@cache
def built(variant: str) -> Built:
    info, tensors = VARIANTS[variant]()
    weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    return Ours(info, weights).to(torch.float64), cast(tensors, torch.float64)


@torch.no_grad()
def fine(latent: str, batch: str, copies: int, variant: str = "golden") -> Tensor:
    """Our fine stage with so many copies of the reference."""
    ours, tensors = built(variant)
    recipe = replace(RECIPES["c_fine_same_noise"], latent=latent, copies=True)
    image = conditioning(recipe, tensors, batch, copies)
    x, t = video(tensors, f"sample{batch}"), tensors[f"inputs.timestep{batch}"]
    return ours(x, t, tensors[f"inputs.encoder_hidden_states{batch}"], "fine", image)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", ["", "_b2"])
def test_one_reference_frame_equals_copies_with_equal_noise(batch: str, variant: str) -> None:
    one = fine("same_noise", batch, 1, variant)
    assert worst(one, fine("same_noise", batch, 4, variant)) <= FLOAT64
    assert worst(one, fine("own_noise", batch, 4, variant)) > 1e-4, "they are read"


@pytest.mark.parametrize("batch", ["", "_b2"])
def test_copies_with_noise_of_their_own_are_another_thing(batch: str) -> None:
    """The released behaviour (golden: ``d_fine_own_noise``): the others reach the copy that is read."""
    own = fine("own_noise", batch, 4)
    assert worst(own, fine("own_noise", batch, 1)) > 1e-2
    _, tensors = built("golden")
    assert worst(own.transpose(1, 2), tensors[f"outputs.d_fine_own_noise{batch}"]) <= 2e-5


def test_the_naive_network_needs_every_copy_too() -> None:
    info, tensors = unet_file(TINY)
    given = cast(tensors, torch.float64)
    dense = dense_of(
        info, {k.removeprefix("weights."): x for k, x in given.items() if k.startswith("weights.")}
    )
    name = "d_fine_own_noise"
    given["inputs.exemplar_latent_own_noise"][:, :, 1:] *= -1  # all but the first copy
    assert worst(produce(name, dense, given).transpose(1, 2), tensors[f"outputs.{name}"]) > 1e-4
