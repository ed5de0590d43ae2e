"""The shape's overlap is near 1 for the toy world's own subjects, in any pose, and tells them from all others."""

import pytest
import torch

from dit_booth.data.toyworld.shapes import SHAPES
from dit_booth.data.toyworld.world import Toyworld, ToyworldConfig
from dit_booth.evaluation.shape import best_shape, shape_overlap, video_shape_overlap

torch.set_num_threads(1)

EXAMPLES = {
    example.subject: example
    for example in map(Toyworld(ToyworldConfig(size=32, frames=3, seed=5)).__getitem__, range(80))
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_toy_world_has_its_own_shapes(shape):
    example = EXAMPLES[shape]
    assert video_shape_overlap(example.video, shape) > 0.85  # 0.9 to 0.99 when this was written
    assert [best_shape(mask) for mask in example.mask] == [shape] * 3


def test_overlap_is_worked_out_by_hand():
    square = torch.zeros(32, 32, dtype=torch.bool)
    square[8:24, 6:22] = True
    assert shape_overlap(square, "square") == 1
    square[12:20, 10:18] = False  # a quarter of it
    assert shape_overlap(square, "square") == pytest.approx(0.75, abs=0.01)


def test_ragged_outlines_overlap_less_the_more_ragged_they_are():
    mask = EXAMPLES["heart"].mask[0]
    flips = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    scores = [shape_overlap(mask ^ (flips < share), "heart") for share in (0.0, 0.05, 0.1, 0.2)]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[-1] > 0.3


def test_nothing_has_no_shape():
    assert shape_overlap(torch.zeros(32, 32, dtype=torch.bool), "star") == 0
    with pytest.raises(ValueError, match="shape is 'blob'; choose one of circle, "):
        shape_overlap(torch.ones(4, 4, dtype=torch.bool), "blob")
