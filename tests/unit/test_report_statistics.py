"""Crossed intervals, their false-positive rate and power, Holm's correction and margins."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import stdtr

from dit_booth.study.statistics import (
    MIN_SEEDS,
    Array,
    Estimate,
    combine,
    crossed,
    equivalence,
    estimate_mean,
    holm,
    non_inferiority,
    paired_difference,
    residual_square,
    t_quantile,
    to_table,
)


def simulate(seeds: int, prompts: int, spread: tuple[float, float, float], count: int) -> Array:
    """Tables of differences with true mean 0; `spread` are the variances of seeds, prompts and their interaction."""
    rng = np.random.default_rng([seeds, prompts, *(int(100 * v) for v in spread)])
    shapes = ((seeds, 1), (1, prompts), (seeds, prompts))
    effects = (v**0.5 * rng.normal(size=(count, *s)) for v, s in zip(spread, shapes, strict=True))
    return sum(effects, np.zeros((count, seeds, prompts)))


def errors_and_df(tables: Array) -> tuple[Array, Array]:
    """Standard error and degrees of freedom of each table, by the functions that `crossed` calls."""
    seeds, prompts = tables.shape[1:]
    free = (seeds - 1) * (prompts - 1)
    by_seed = tables.mean(2).var(1, ddof=1) / seeds
    by_prompt = tables.mean(1).var(1, ddof=1) / prompts
    residual = residual_square(tables, free)
    return combine(by_seed, by_prompt, residual, seeds - 1, prompts - 1, free)


def rejected(tables: Array) -> float:
    stderr, df = errors_and_df(tables)
    return float(np.mean(2 * stdtr(df, -np.abs(tables.mean((1, 2))) / stderr) < 0.05))


# ---- the false-positive rate ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "prompts"), [(5, 12), (5, 64), (10, 24), (20, 12)])
@pytest.mark.parametrize(
    "spread",
    [(1, 1, 1), (1, 0, 1), (0, 1, 1), (1, 0, 0.1), (0, 1, 0.1), (1, 1, 0), (0.1, 0.1, 1), (1, 0.1, 1), (0.1, 1, 1)],
)  # fmt: skip
def test_a_null_is_rejected_in_3_to_7_percent(seeds: int, prompts: int, spread: tuple[float, float, float]):
    """With 5,000 tables the standard error of a rate is 0.3 percentage points."""
    assert 0.03 <= rejected(simulate(seeds, prompts, spread, 5000)) <= 0.07


def test_without_any_effect_the_test_is_conservative():
    for seeds, prompts in ((5, 12), (10, 64)):
        assert rejected(simulate(seeds, prompts, (0, 0, 1), 8000)) < 0.05


def test_intervals_over_one_factor_alone_would_mark_far_more():
    """The reason for the crossed interval: each alone takes the other factor's effects for real differences."""
    tables = simulate(8, 12, (1, 1, 1), 4000)
    for axis in (1, 2):
        assert np.mean(stats.ttest_1samp(tables.mean(axis), 0, axis=1).pvalue < 0.05) > 0.1


def test_two_seeds_reject_too_often_so_nothing_is_marked_below_five():
    assert rejected(simulate(2, 12, (1, 0.1, 1), 8000)) > 0.08
    few = crossed(simulate(MIN_SEEDS - 1, 12, (1, 1, 1), 1)[0])
    enough = crossed(simulate(MIN_SEEDS, 12, (1, 1, 1), 1)[0])
    assert few and enough
    assert (few.exploratory, enough.exploratory) == (True, False)


def test_the_interval_covers_the_truth_and_a_true_difference_is_found():
    tables = simulate(5, 24, (0.2, 0.5, 1), 1500) + 1.0
    found = [crossed(table) for table in tables]
    assert 0.93 <= np.mean([e is not None and e.main.low <= 1 <= e.main.high for e in found]) <= 0.97
    assert np.mean([e is not None and e.main.p < 0.05 for e in found]) > 0.75


# ---- the estimate -----------------------------------------------------------------------------------------------


def test_the_standard_error_by_hand():
    """Seed means 1.5 and 4, prompt means 2 and 3.5; the residuals are +-0.25, with 1 degree of freedom."""
    found = crossed(np.array([[1.0, 2.0], [3.0, 5.0]]))
    assert found and found.by_seed and found.by_prompt
    assert (found.mean, found.seeds, found.prompts) == (2.75, 2, 2)
    assert found.by_seed.half == pytest.approx(12.7062 * 1.25, abs=1e-4)
    assert found.by_prompt.half == pytest.approx(12.7062 * 0.75, abs=1e-4)
    residual = 4 * 0.25**2 / 1 / 4
    total = 1.25**2 + 0.75**2 - residual
    assert found.main.stderr == pytest.approx(math.sqrt(total))
    assert found.main.df == pytest.approx(total**2 / (1.25**4 + 0.75**4 + residual**2))


def test_many_tables_at_once_are_each_table_alone():
    tables = simulate(5, 7, (1, 0.5, 1), 20)
    stderr, df = errors_and_df(tables)
    for table, s, d in zip(tables, stderr, df, strict=True):
        found = crossed(table)
        assert found
        assert (found.main.stderr, found.main.df) == (pytest.approx(s), pytest.approx(d))


def test_it_never_falls_below_either_diagnostic():
    for table in simulate(5, 5, (0, 0, 1), 200):
        found = crossed(table)
        assert found and found.by_seed and found.by_prompt
        assert found.main.stderr >= max(found.by_seed.stderr, found.by_prompt.stderr) - 1e-12


def test_a_single_seed_is_a_paired_t_test_over_prompts():
    rng = np.random.default_rng(0)
    theirs = rng.normal(10, 5, 12)
    ours = theirs - 1 + rng.normal(0, 0.3, 12)  # far closer to each other than prompts are
    found = paired_difference(*({0: dict(zip("abcdefghijkl", x, strict=True))} for x in (ours, theirs)))
    wanted = stats.ttest_rel(ours, theirs)
    interval = wanted.confidence_interval(0.95)
    assert found and found.by_seed is None
    assert found.main.over == "prompts"
    assert (found.main.low, found.main.high, found.main.p) == pytest.approx(
        (interval.low, interval.high, wanted.pvalue)
    )


def test_a_metric_without_prompts_varies_over_seeds():
    values = [3.0, 4.0, 8.0, 6.0, 5.5]
    found = estimate_mean({seed: {"": value} for seed, value in enumerate(values)})
    wanted = stats.ttest_1samp(values, 0)
    assert found and found.by_prompt is None
    assert found.main.over == "seeds"
    assert found.main.p == pytest.approx(wanted.pvalue)
    assert found.main.low == pytest.approx(wanted.confidence_interval().low)


@pytest.mark.parametrize("table", [[[4.0]], [[1.0, math.inf], [2.0, 3.0]]])
def test_what_has_no_interval_has_no_p(table: list[list[float]]):
    found = crossed(np.array(table))
    assert found
    assert math.isnan(found.main.half) and math.isnan(found.main.p)


def test_differences_without_any_spread():
    nothing, always = crossed(np.zeros((5, 3))), crossed(np.full((5, 3), 0.1))
    assert nothing and always
    assert (nothing.main.p, always.main.p) == (1.0, 0.0)
    assert crossed(np.full((2, 3), np.nan)) is None
    assert crossed(np.zeros((0, 0))) is None


# ---- missing cells ------------------------------------------------------------------------------------------------


def test_only_what_both_have_is_compared():
    ours = {0: {"a": 5.0, "b": 1.0}, 1: {"a": 9.0}, 2: {"a": 7.0}}
    theirs = {0: {"a": 1.0, "c": 100.0}, 2: {"a": 1.0}, 3: {"a": 50.0}}
    found = paired_difference(ours, theirs)
    assert found
    assert (found.mean, found.seeds, found.prompts) == (5.0, 2, 1)
    assert paired_difference({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None
    assert paired_difference({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None


def test_a_missing_hard_prompt_does_not_shift_its_seed():
    """An additive table with gaps is restored exactly: the mean is that of the whole table, not of what is left."""
    whole = np.array([0.0, 1.0, 5.0])[:, None] + np.array([1.0, 2.0, 30.0, 4.0])[None]
    gaps = whole.copy()
    gaps[0, 2] = gaps[2, 0] = np.nan
    found = crossed(gaps)
    assert found
    assert found.mean == pytest.approx(whole.mean())
    assert abs(np.nanmean(gaps) - whole.mean()) > 1


def test_gaps_keep_the_false_positive_rate():
    tables = simulate(6, 12, (0.5, 0.5, 1), 1500)
    tables[np.random.default_rng(1).random(tables.shape) < 0.15] = np.nan
    ps = [found.main.p for table in tables if (found := crossed(table))]
    assert len(ps) == 1500
    assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.07


def test_prompts_of_each_seed_s_own_are_not_pooled():
    """Nothing links the seeds, so nothing is subtracted: the sum of both squared errors."""
    found = paired_difference(
        {0: {"a": 1.0, "b": 2.0}, 1: {"c": 3.0, "d": 6.0}}, {0: {"a": 0.0, "b": 0.0}, 1: {"c": 0.0, "d": 0.0}}
    )
    assert found and found.by_seed and found.by_prompt
    assert (found.mean, found.prompts) == (3.0, 4)
    assert found.main.stderr == pytest.approx(math.hypot(found.by_seed.stderr, found.by_prompt.stderr))


def test_a_table_keeps_the_order_of_its_prompts():
    table = to_table({3: {"b": 1.0, "a": 2.0}, 1: {"a": 4.0}})
    assert np.array_equal(table, [[1, 2], [math.nan, 4]], equal_nan=True)


# ---- corrections and margins ---------------------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    found = holm([0.02, math.nan])
    assert found[0] == pytest.approx(0.04) and math.isnan(found[1])  # a NaN counts as a test


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_none_and_bonferroni_and_keeps_the_order(ps: list[float]):
    found = holm(ps)
    for p, adjusted in zip(ps, found, strict=True):
        assert p <= adjusted <= min(1.0, len(ps) * p) + 1e-12
    ordered = [adjusted for _, adjusted in sorted(zip(ps, found, strict=True))]
    assert all(a <= b for a, b in pairwise(ordered))


def test_holm_keeps_the_family_s_error_rate():
    ps = np.random.default_rng(0).random((4000, 5))
    assert 0.04 < np.mean([min(holm(row)) < 0.05 for row in ps]) < 0.06
    assert np.mean(ps.min(1) < 0.05) > 0.2


@pytest.mark.parametrize("better", [1, -1])
def test_a_margin(better: int):
    values = np.array([-0.3, 0.1, -0.2, 0.2, -0.1, 0.3, 0.05])
    found = crossed(values[:, None])
    assert found
    worse = "greater" if better > 0 else "less"
    wanted = stats.ttest_1samp(values, -better * 0.5, alternative=worse).pvalue
    assert non_inferiority(found.main, 0.5, better) == pytest.approx(wanted)
    both = max(
        stats.ttest_1samp(values, bound, alternative=way).pvalue
        for bound, way in ((-0.5, "greater"), (0.5, "less"))
    )
    assert equivalence(found.main, 0.5) == pytest.approx(both)
    assert both < 0.05
    assert equivalence(found.main, 0.1) > 0.05
    far = Estimate(
        mean=better * 9.0, stderr=0.1, df=9, over="seeds"
    )  # much better is not worse, nor equivalent
    assert non_inferiority(far, 0.5, better) < 1e-6
    assert equivalence(far, 0.5) > 0.99


def test_a_difference_as_large_as_the_margin_is_called_equivalent_in_5_percent():
    tables = simulate(5, 12, (1, 1, 1), 1500) + 4.0
    ps = [equivalence(found.main, 4.0) for table in tables if (found := crossed(table))]
    assert 0.03 <= np.mean(np.array(ps) < 0.05) <= 0.07


def test_quantiles_are_scipys():
    assert t_quantile(1) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(3.7) == pytest.approx(stats.t.ppf(0.975, 3.7))
    assert math.isnan(t_quantile(0))


# ---- another implementation ----------------------------------------------------------------------------------------


def test_a_mixed_model_has_the_same_standard_error():
    """REML of crossed random effects, by statsmodels: equal for complete tables with positive components."""
    models = pytest.importorskip("statsmodels.formula.api")
    pandas = pytest.importorskip("pandas")
    table = simulate(6, 10, (1, 1, 1), 1)[0] + 0.5
    seed, prompt = (index.ravel() for index in np.indices(table.shape))
    frame = pandas.DataFrame({"d": table.ravel(), "seed": seed, "prompt": prompt, "all": 1})
    parts = {"seed": "0 + C(seed)", "prompt": "0 + C(prompt)"}
    fit = models.mixedlm("d ~ 1", frame, groups="all", re_formula="0", vc_formula=parts).fit(reml=True)
    found = crossed(table)
    assert found
    assert found.mean == pytest.approx(fit.fe_params["Intercept"], abs=1e-6)
    assert found.main.stderr == pytest.approx(fit.bse_fe["Intercept"], rel=1e-3)
