"""The human study's statistics: crossed effects, strengths, agreement, side bias, coverage and power."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dit_booth.human.agreement import coincidences, estimate_alpha, estimate_learning, krippendorff, side_rate
from dit_booth.human.crossed import estimate_rate, fit_components, indicators
from dit_booth.human.design import draw_cells
from dit_booth.human.exclude import Observation
from dit_booth.human.power import Plan, detectable, raters_needed
from dit_booth.human.strengths import fit_davidson
from experiments.bench.human_study import case, coverage, simulated_power


def sparse(seed: int, share: float = 0.4) -> tuple[list[float], list[int], list[int]]:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, 0.2, 14), rng.normal(0, 0.3, 9)
    y = 0.5 + a[:, None] + b + rng.normal(0, 0.3, (14, 9))
    rater, prompt = np.nonzero(rng.random((14, 9)) < share)
    return list(y[rater, prompt]), list(map(int, rater)), list(map(int, prompt))


def test_the_crossed_model_is_that_of_statsmodels():
    import pandas  # like statsmodels and choix, seconds of every worker's collection
    import statsmodels.api as sm

    y, rater, prompt = sparse(0)
    own = fit_components(y, [indicators(rater), indicators(prompt)])
    frame = pandas.DataFrame({"y": y, "r": rater, "p": prompt, "all": 1})
    formula = {"r": "0 + C(r)", "p": "0 + C(p)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = sm.MixedLM.from_formula(
            "y ~ 1", groups="all", vc_formula=formula, re_formula="0", data=frame
        ).fit()
    assert own.estimate.mean == pytest.approx(fit.params["Intercept"], abs=2e-3)
    assert own.estimate.stderr == pytest.approx(fit.bse["Intercept"], rel=0.02)
    assert own.residual == pytest.approx(fit.scale, rel=0.02)
    raters, prompts = own.effects
    assert prompts == pytest.approx(fit.vcomp[0], rel=0.05) and raters == pytest.approx(
        fit.vcomp[1], abs=5e-3
    )


def test_a_rate_without_variance_has_an_exact_interval():
    rate = estimate_rate([1.0] * 12, [n % 4 for n in range(12)], [n // 4 for n in range(12)])
    assert (rate.mean, rate.high) == (1.0, 1.0) and rate.low == pytest.approx(0.025 ** (1 / 3))
    zero = estimate_rate([0.0] * 4, [0, 1, 2, 3], [0, 1, 2, 3])
    assert (zero.mean, zero.low) == (0.0, 0.0) and zero.high == pytest.approx(1 - 0.025**0.25)
    assert estimate_rate([], [], []) is None
    assert not estimate_rate([0.5, 0.5], ["a", "a"], [0, 0]).known


def test_strengths_without_ties_are_bradley_and_terrys():
    import choix

    rng = np.random.default_rng(0)
    pairs = list(combinations(range(4), 2))
    wins = rng.integers(20, 80, (6, 2))
    counts = np.stack([wins[:, 0], np.zeros(6), wins[:, 1]], axis=1).astype(float)
    strengths, ties = fit_davidson(counts, pairs, 4)
    data = [pair for (a, b), (x, y) in zip(pairs, wins, strict=True) for pair in [(a, b)] * x + [(b, a)] * y]
    expected = choix.ilsr_pairwise(4, data)
    assert strengths == pytest.approx(expected - expected.mean(), abs=2e-3) and ties < 0.02


def test_strengths_with_ties_maximise_the_likelihood_of_davidson():
    """At expected counts the estimate is the truth; and a system that always wins stays finite."""
    truth, nu = np.array([0.9, 0.1, -1.0]), 0.7
    pairs = [(0, 1), (0, 2), (1, 2)]
    odds = [(np.exp((truth[a] - truth[b]) / 2), nu, np.exp((truth[b] - truth[a]) / 2)) for a, b in pairs]
    counts = 1e5 * np.array([np.array(o) / sum(o) for o in odds])
    strengths, ties = fit_davidson(np.stack([counts, counts[:, ::-1]]), pairs, 3)
    assert strengths == pytest.approx(np.stack([truth, -truth]), abs=1e-3) and ties == pytest.approx(
        nu, abs=1e-3
    )
    always, _ = fit_davidson(np.array([[9.0, 0, 0]]), [(0, 1)], 2)
    assert np.isfinite(always).all() and always[0] > 1


def test_alpha_is_that_of_krippendorffs_worked_example():
    """Krippendorff 2011, section C: four observers, twelve units; nominal 0.743, ordinal 0.815."""
    rows = [
        "1 2 3 3 2 1 4 1 2 . . .",
        "1 2 3 3 2 2 4 1 2 5 . 3",
        ". 3 3 3 2 3 4 2 2 5 1 .",
        "1 2 3 3 2 4 4 1 2 5 1 .",
    ]
    units = zip(*(row.split() for row in rows), strict=True)
    values = [[float(v) for v in unit if v != "."] for unit in units]
    table = sum(coincidences(unit, (1, 2, 3, 4, 5)) for unit in values if len(unit) > 1)
    assert krippendorff(table, ordinal=False) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(table) == pytest.approx(0.815, abs=5e-4)


def test_alpha_is_that_of_the_library():
    library = pytest.importorskip("krippendorff", reason="a check against the library krippendorff")
    counts = np.random.default_rng(0).integers(0, 5, (20, 3)) + np.array([1, 0, 1])
    levels = (0.0, 0.5, 1.0)
    table = sum(coincidences(list(np.repeat(levels, own)), levels) for own in counts)
    for level in ("ordinal", "nominal"):
        value = library.alpha(value_counts=counts, value_domain=levels, level_of_measurement=level)
        assert krippendorff(table, ordinal=level == "ordinal") == pytest.approx(value)


def observed(rater: int, prompt: int, value: float, **more: float) -> Observation:
    plain = {"question": "q", "first": 0, "second": 1, "swapped": False, "trial": 0, "seconds": 1.0, **more}
    return Observation(rater=str(rater), prompt=prompt, value=value, **plain)


def test_alpha_is_one_for_full_agreement_and_does_not_depend_on_the_order_of_systems():
    full = [observed(r, p, float(p % 2)) for r in range(5) for p in range(6)]
    assert estimate_alpha(full).value == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    mixed = [observed(r, p, float(rng.random() < 0.8)) for r in range(8) for p in range(10)]
    swapped = [replace(o, value=1 - o.value) if o.prompt % 2 else o for o in mixed]
    assert estimate_alpha(mixed).value == pytest.approx(estimate_alpha(swapped).value)
    chance = [observed(r, p, float(rng.integers(3)) / 2) for r in range(8) for p in range(40)]
    assert abs(estimate_alpha(chance).value) < 0.1 and np.isnan(estimate_alpha(full[:1]).value)


def test_learning_and_side_bias_are_found():
    rng = np.random.default_rng(0)
    seconds = {True: 8.0, False: 4.0}
    own = [
        observed(
            r,
            t % 5,
            float(rng.random() < 0.7),
            trial=t,
            seconds=seconds[t < 10] + r / 100,
            swapped=bool(rng.random() < 0.5),
        )
        for r in range(10)
        for t in range(20)
    ]
    learning = estimate_learning(own, {str(r): 20 for r in range(10)})
    assert (
        learning.seconds_ratio.mean == pytest.approx(np.log(0.5), abs=0.02)
        and learning.seconds_ratio.high < -0.6
    )
    assert learning.ties.mean == 0 and learning.agreement.low < 0 < learning.agreement.high
    assert estimate_learning(own[:20], {"0": 20}).ties is None


def sided(bias: float, preference: float, questions: int = 1) -> list[Observation]:
    """12 raters, who see 8 pairs of videos on balanced sides."""
    rng = np.random.default_rng(0)
    out = []
    for r, p in np.ndindex(12, 8):
        swapped = bool((r + p) % 2)
        value = float(rng.random() < preference + (bias if swapped else -bias))
        out += [observed(r, p, value, trial=p, swapped=swapped, question=f"q{n}") for n in range(questions)]
    return out


def test_a_side_bias_is_found_and_preferences_are_no_noise_of_it():
    biased = side_rate(sided(0.25, 0.5))
    assert biased.low > 0.5 and biased.high > 0.75
    # Everyone prefers the same videos: the sides are known to be even, however few the raters.
    certain = [replace(o, value=float(o.prompt % 2)) for o in sided(0, 0.5)]
    even = side_rate(certain)
    assert even.mean == pytest.approx(0.5) and even.high - even.low < 0.02
    # The answers to four questions about one look are not four looks.
    one, four = side_rate(sided(0, 0.5)), side_rate(sided(0, 0.5, questions=4))
    assert (four.mean, four.low, four.high) == (one.mean, one.low, one.high)
    assert four.answers == 4 * one.answers and side_rate([]) is None


def test_intervals_cover_what_they_should():
    """A small version of experiments/bench/human_study.py, whose 200 studies are in docs/results/human_study.md."""
    found = coverage(case("small", 8, 8, 12, (0.7, 0.0, -0.7), rater_sd=0.4, prompt_sd=0.4), 10)
    assert found["preferences"] >= 0.8 and found["strengths"] >= 0.8 and found["side"] >= 0.7
    assert found["ranking"] > 0.6


def test_the_formulas_power_is_that_of_simulations():
    share, power = simulated_power(10)
    assert 0.55 < share < 0.75 and power >= 0.5


def test_power_grows_with_raters_and_is_limited_by_prompts():
    plan = Plan(raters=20, prompts=12)
    shares = [detectable(replace(plan, raters=r)).share for r in (5, 20, 80)]
    assert shares == sorted(shares, reverse=True)
    many = detectable(replace(plan, raters=100_000)).share
    assert many == pytest.approx(
        0.5 + 0.15 / 12**0.5 * (2.201 + 0.876), abs=2e-3
    )  # t quantiles of 11 degrees
    assert raters_needed(plan, many - 0.01) is None
    needed = raters_needed(plan, 0.68)
    assert (
        detectable(replace(plan, raters=needed)).share
        <= 0.68
        < detectable(replace(plan, raters=needed - 1)).share
    )
    with pytest.raises(ValueError, match="pairs is 99; there are 36"):
        Plan(pairs=99)
    with pytest.raises(ValueError, match=r"rater_sd is -0\.1"):
        Plan(rater_sd=-0.1)


def test_power_of_each_design():
    plan = Plan(systems=7, prompts=14, block=3, pairs=20)
    sizes = {
        design: (own.system_pairs, own.cells, own.shared_prompts)
        for design in ("all", "baseline", "blocks")
        if (own := replace(plan, design=design))
    }
    assert sizes == {"all": (21, 294, 14), "baseline": (6, 84, 14), "blocks": (21, 42, 2)}
    for design in sizes:
        cells = draw_cells(design, 7, 14, block=3, rng=np.random.default_rng(0))
        pairs = {(c.first, c.second) for c in cells}
        assert len(cells) == sizes[design][1] and len(pairs) <= sizes[design][0]
    # A pair of systems has its blocks' prompts only: as many answers say less than with all pairs.
    many = replace(plan, raters=200, prompts=140)
    shares = {design: detectable(replace(many, design=design)).share for design in sizes}
    assert shares["baseline"] < shares["all"] < shares["blocks"]
    assert detectable(replace(plan, design="blocks", block=7)) == detectable(plan)
    with pytest.raises(ValueError, match=r"compared for 0\.86: use at least 14,"):
        Plan(systems=7, prompts=6, design="blocks")
    with pytest.raises(ValueError, match="block is 8"):
        Plan(systems=7, block=8, design="blocks")
