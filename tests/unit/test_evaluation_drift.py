"""Drift of a metric over frames, by hand and against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_booth.evaluation.drift import framepack, last_minus_first, slope


def test_a_line_has_its_slope():
    values = 3 - 0.25 * np.arange(20)
    assert slope(values) == pytest.approx(-0.25)
    assert last_minus_first(values) == pytest.approx(-0.25 * 15)  # means of frames 15..19 and 0..4
    assert framepack(values) == pytest.approx(0.25 * 17)  # of frames 17..19 and 0..2


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40))
def test_a_slope_is_numpys(values: list[float]):
    assert slope(values) == pytest.approx(np.polyfit(np.arange(len(values)), values, 1)[0], abs=1e-6)


def test_frames_without_a_value_keep_their_place():
    values = np.array([np.nan, 1.0, np.nan, 3.0, np.nan, 5.0, 6.0, np.nan])
    assert slope(values) == pytest.approx(1.0)
    assert last_minus_first(values) == 6.0 - 1.0
    assert math.isnan(framepack(values))  # the first frame and the last one have none


@pytest.mark.parametrize("values", [[], [1.0], [math.nan] * 5, [math.nan, 2.0, math.nan]])
def test_without_two_frames_there_is_no_drift(values: list[float]):
    assert all(math.isnan(drift(values)) for drift in (slope, last_minus_first, framepack))


@pytest.mark.parametrize(
    ("frames", "quarter", "share"), [(2, 1, 1), (4, 1, 1), (8, 2, 1), (16, 4, 2), (20, 5, 3)]
)
def test_lengths_of_both_ends(frames: int, quarter: int, share: int):
    """At least one frame at each end: a step in the middle is seen in full, one at the very end by its share."""
    step = np.repeat([0.0, 1.0], frames // 2)
    assert (last_minus_first(step), framepack(step)) == (1.0, 1.0)
    last = np.zeros(frames)
    last[-1] = 1.0
    assert (last_minus_first(last), framepack(last)) == pytest.approx((1 / quarter, 1 / share))
    assert framepack(-last) == framepack(last)
