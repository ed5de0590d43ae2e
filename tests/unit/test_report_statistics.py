"""Intervals and paired differences, against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from dit_booth.study.statistics import (
    Difference,
    Estimate,
    from_stderr,
    paired_difference,
    t_interval,
    t_quantile,
)


def test_an_interval_by_hand():
    found = t_interval([1, 2, 3], "seeds")  # t(2 degrees) = 4.3027, standard error 1 / sqrt(3)
    assert (found.mean, found.n, found.over) == (2, 3, "seeds")
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), abs=1e-5)
    assert found.low == pytest.approx(2 - found.half)
    assert t_quantile(2) == pytest.approx(12.7062, abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_intervals_are_scipys(n: int):
    values = np.random.default_rng(n).normal(3, 2, n)
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    found = t_interval(values, "prompts")
    assert (found.low, found.high) == pytest.approx((low, high))
    same = from_stderr(float(values.mean()), float(stats.sem(values)), n, "prompts")
    assert (same.low, same.high) == pytest.approx((low, high))


@pytest.mark.parametrize("values", [[4.0], [1.0, math.inf], [1.0, math.nan]])
def test_what_has_no_interval_has_none_and_resolves_nothing(values: list[float]):
    found = t_interval(values, "seeds")
    assert math.isnan(found.half)
    assert not found.excludes_zero


def test_no_spread_is_an_interval_of_no_width():
    assert t_interval([0.5, 0.5, 0.5], "seeds").excludes_zero
    assert not t_interval([0.0, 0.0, 0.0], "seeds").excludes_zero


@pytest.mark.parametrize("values", [[0.5, 0.5], [0.9 - 0.8, 0.8 - 0.7], [-0.25, -0.25]])
def test_two_equal_values_resolve_nothing(values: list[float]):
    """Two seeds of a metric with few values are often equal by chance."""
    found = t_interval(values, "seeds")
    assert found.half < 1e-12
    assert not found.excludes_zero
    assert Difference(found, Estimate(0.1, 0.01, 12, "prompts")).mark == "†"


def test_one_seed_is_a_paired_t_test_over_prompts():
    rng = np.random.default_rng(0)
    theirs = rng.normal(10, 5, 12)
    ours = theirs - 1 + rng.normal(0, 0.3, 12)  # far closer to each other than prompts are
    found = paired_difference(*({0: dict(zip("abcdefghijkl", x, strict=True))} for x in (ours, theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found is not None
    assert found.seeds is None
    assert found.main is found.prompts
    assert (found.main.low, found.main.high) == pytest.approx((interval.low, interval.high))
    assert found.mark == "†"


def test_seeds_are_the_units_where_there_are_some():
    ours = {0: {"a": 1.0, "b": 2.0}, 1: {"a": 3.0, "b": 5.0}}
    theirs = {0: {"a": 0.0, "b": 0.0}, 1: {"a": 0.0, "b": 0.0}}
    found = paired_difference(ours, theirs)
    assert found is not None and found.seeds and found.prompts
    assert (found.seeds.mean, found.seeds.n) == (2.75, 2)  # the means of the seeds are 1.5 and 4
    assert found.seeds.half == pytest.approx(12.7062 * 1.25, abs=1e-4)
    assert (found.prompts.mean, found.prompts.n) == (
        2.75,
        2,
    )  # those of the prompts 2 and 3.5: not four values
    assert found.prompts.half == pytest.approx(12.7062 * 0.75, abs=1e-4)
    assert found.mark == ""


def test_only_what_both_have_is_compared():
    ours = {0: {"a": 5.0, "b": 1.0}, 1: {"a": 9.0}, 2: {"a": 7.0}}
    theirs = {0: {"a": 1.0, "c": 100.0}, 2: {"a": 1.0}, 3: {"a": 50.0}}
    found = paired_difference(ours, theirs)
    assert found is not None and found.seeds and found.prompts
    assert (found.mean, found.seeds.n, found.prompts.n) == (5.0, 2, 1)
    assert paired_difference({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None
    assert paired_difference({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None


def test_prompts_that_differ_by_seed_count_each():
    ours = {0: {"a": 1.0, "b": 2.0}, 1: {"c": 3.0, "d": 6.0}}
    found = paired_difference(ours, {seed: dict.fromkeys(row, 0.0) for seed, row in ours.items()})
    assert found is not None and found.prompts
    assert found.prompts.n == 4


def test_marks():
    wide, narrow = Estimate(1, 5, 2, "seeds"), Estimate(1, 0.5, 2, "seeds")
    near, far = Estimate(1, 0.5, 8, "prompts"), Estimate(1, 2, 8, "prompts")
    assert Difference(narrow, far).mark == "*"
    assert Difference(wide, near).mark == "†"
    assert Difference(wide, far).mark == ""
    assert Difference(None, near).mark == "†"
