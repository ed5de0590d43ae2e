"""Where a token stands: extrapolation of the fixed embeddings, and rotary angles against complex numbers."""

from __future__ import annotations

import torch
from spies import worst

from dit_booth.models.positions import grid_embedding, rotary_3d, rotary_frames

torch.set_num_threads(1)
CPU, F64 = torch.device("cpu"), torch.float64


def test_longer_and_larger_grids_continue_the_smaller() -> None:
    """Extrapolation: what a position is does not depend on the size around it."""
    small, large = (grid_embedding(3, 4, 32, CPU, range(f)) for f in (2, 5))
    assert torch.equal(large[:2], small)
    tall = grid_embedding(6, 4, 32, CPU, range(2))
    assert torch.equal(tall[:, : 3 * 4], small)
    turned, longer = (rotary_3d(range(f), 3, 4, 12, CPU, F64) for f in (2, 5))
    assert torch.equal(longer.cos[:2], turned.cos)
    assert torch.equal(grid_embedding(3, 4, 32, CPU, range(-1, 2))[1:], small), (
        "a context comes before frame 0"
    )


def test_rotary_angles_are_time_row_and_column() -> None:
    """Pair i of an axis with p pairs turns by position / 10000 ** (i / p)."""
    rotary = rotary_3d(range(-1, 2), 2, 3, 16, CPU, F64)
    assert rotary.cos.shape == (3, 6, 1, 16)
    expected = torch.tensor(
        [
            [
                [t / 10_000 ** (i / 4) for i in range(4)]
                + [r / 10_000 ** (i / 2) for i in range(2)]
                + [c / 10_000 ** (i / 2) for i in range(2)]
                for r in range(2)
                for c in range(3)
            ]
            for t in (-1, 0, 1)
        ],
        dtype=F64,
    )
    cos, sin = expected.cos(), expected.sin()
    assert worst(rotary.cos[:, :, 0], torch.cat([cos, cos], -1)) < 1e-12
    assert worst(rotary.sin[:, :, 0], torch.cat([-sin, sin], -1)) < 1e-12
    x = torch.randn(2, 3, 6, 2, 16, dtype=F64)
    complex_x = (
        torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones(()).double(), expected)[:, :, None]
    )
    assert worst(rotary.apply(x), torch.cat([complex_x.real, complex_x.imag], -1)) < 1e-12


def test_rotary_scores_depend_on_distances_only() -> None:
    q, k = torch.randn(1, 1, 1, 1, 12, dtype=F64), torch.randn(1, 1, 1, 1, 12, dtype=F64)
    rotary = rotary_3d(range(4), 4, 4, 12, CPU, F64)

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        at = [r[0] * 16 + r[1] * 4 + r[2] for r in (a, b)]
        turned = [
            rotary.apply(y.expand(1, 4, 16, 1, 12)).flatten(1, 2)[0, i, 0]
            for y, i in zip((q, k), at, strict=True)
        ]
        return float(turned[0] @ turned[1])

    assert abs(score((0, 0, 0), (1, 2, 1)) - score((2, 1, 2), (3, 3, 3))) < 1e-12
    assert abs(score((0, 0, 0), (1, 2, 1)) - score((0, 0, 0), (1, 1, 2))) > 1e-3


def test_what_has_no_place_in_the_grid_is_not_turned() -> None:
    rotary = rotary_3d(range(3), 2, 2, 12, CPU, F64)
    bank, reference = torch.randn(1, 1, 7, 2, 12, dtype=F64), torch.randn(1, 1, 4, 2, 12, dtype=F64)
    assert rotary.apply(bank) is bank
    frames = torch.cat([reference, torch.randn(1, 2, 4, 2, 12, dtype=F64)], dim=1)
    assert torch.equal(rotary.apply(reference), rotary.apply(frames)[:, :1]), (
        "a reference is turned as frame 0"
    )
    assert rotary.apply(reference.bfloat16()).dtype == torch.bfloat16


def test_time_alone_is_the_same_in_one_group_and_apart() -> None:
    whole, apart = (rotary_frames(range(3), 8, CPU, F64, group_per_frame=flag) for flag in (False, True))
    x = torch.randn(2, 1, 3, 2, 8, dtype=F64)
    assert torch.equal(whole.apply(x), apart.apply(x.transpose(1, 2)).transpose(1, 2))
