"""Intervals and tests for paired measurements, against scipy, closed forms and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.analysis.statistics import Estimate, estimate, holm

DRAWS = 20_000
NOISE = 0.05
"""A variance from 20,000 draws is off by 1 % (one standard deviation): five times that."""


def difference(means: np.ndarray) -> np.ndarray:
    """Return the first quantity less the second, averaged over concepts and seeds."""
    return (means[:, :, 0] - means[:, :, 1]).mean(axis=(1, 2))


def drawn(seed: int, *shape: int) -> np.ndarray:
    """Return normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def components(x: np.ndarray) -> tuple[float, float, float]:
    """Return the variances of a mean of [prompts, seeds] by seeds, prompts and cells: two-way analysis of variance."""
    prompts, seeds = x.shape
    left = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    return (
        x.mean(axis=0).var(ddof=1) / seeds,
        x.mean(axis=1).var(ddof=1) / prompts,
        (left**2).sum() / ((prompts - 1) * (seeds - 1)) / (prompts * seeds),
    )


# -- the variance ------------------------------------------------------------------------------------------------


def test_variances_of_a_mean_difference_are_those_of_the_analysis_of_variance():
    """One concept; the bootstrap, which knows nothing of means, finds them."""
    x = drawn(0, 2, 6, 4) + 3.0 * drawn(10, 2, 6, 1)
    found = estimate([x], difference, draws=DRAWS)

    by_seeds, by_prompts, by_cells = components(x[0] - x[1])
    assert found.value == pytest.approx((x[0] - x[1]).mean())
    assert found.variance_seeds == pytest.approx(by_seeds, rel=NOISE)
    assert found.variance_prompts == pytest.approx(by_prompts - by_cells, rel=NOISE)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda a, b, axis=-1: (a - b).mean(axis=axis), difference),
        (
            lambda a, b, axis=-1: 1.0 - a.mean(axis=axis) / b.mean(axis=axis),
            lambda m: 1.0 - m[:, 0, 0].mean(axis=1) / m[:, 0, 1].mean(axis=1),
        ),
    ],
    ids=["difference", "share"],
)
def test_the_bootstrap_over_seeds_is_scipys(theirs, ours):
    """Paired; of a mean and of a ratio such as SGR. Theirs draws n of n, which makes a mean's variance (n - 1) / n of
    the unbiased one, ours one less."""
    seeds = 40
    x = 5.0 + drawn(20, 2, 1, seeds) * np.array([1.0, 0.3])[:, None, None]
    found = estimate([x], ours, draws=DRAWS)
    with_scipy = stats.bootstrap(
        (x[0, 0], x[1, 0]), theirs, paired=True, n_resamples=DRAWS, method="basic", vectorized=True,
        random_state=np.random.default_rng(21),
    )  # fmt: skip

    # five standard deviations of two bootstraps of 1 % each
    assert found.variance_seeds * (seeds - 1) / seeds == pytest.approx(with_scipy.standard_error**2, rel=0.07)


def test_concepts_share_seeds_and_have_prompts_of_their_own():
    """Seeds: the variance of the concepts' joint mean; prompts: theirs, a quarter of the sum for two."""
    x, y = (drawn(i, 2, n, 4) + 3.0 * drawn(i + 10, 2, n, 1) for i, n in ((1, 6), (2, 3)))
    found = estimate([x, y], difference, draws=DRAWS)

    a, b = x[0] - x[1], y[0] - y[1]
    joint = (a.mean(axis=0) + b.mean(axis=0)) / 2
    assert found.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert found.variance_seeds == pytest.approx(joint.var(ddof=1) / 4, rel=NOISE)
    own = sum(by_prompts - by_cells for _, by_prompts, by_cells in (components(a), components(b))) / 4
    assert found.variance_prompts == pytest.approx(own, rel=NOISE)


def test_prompts_that_differ_less_than_cells_do_add_nothing():
    """By chance their part comes out below zero; a variance is none."""
    x = drawn(0, 2, 6, 4)
    x -= x.mean(axis=2, keepdims=True)

    assert estimate([x], difference).variance_prompts == 0.0


def test_what_both_sides_share_does_not_count():
    """Prompts and seeds that are hard for both are paired away."""
    x = drawn(3, 2, 6, 4)
    shared = 100.0 * drawn(4, 6, 4)

    plain, hard = estimate([x], difference), estimate([x + shared], difference)
    assert hard.value == pytest.approx(plain.value)
    assert hard.interval() == pytest.approx(plain.interval())


def test_the_same_seed_gives_the_same_numbers():
    """And the order of draws is no part of the data."""
    x = drawn(5, 2, 6, 4)

    assert estimate([x], difference, seed=1) == estimate([x], difference, seed=1)


# -- intervals and p-values --------------------------------------------------------------------------------------


def test_without_prompts_to_vary_it_is_scipys_paired_t_test():
    """One prompt (a distance between sets of images): chance in seeds is all that can be estimated."""
    x = drawn(6, 2, 1, 5)
    found = estimate([x], difference, draws=200_000)
    exact = Estimate(found.value, (x[0, 0] - x[1, 0]).var(ddof=1) / 5, None, 5, 0)
    theirs = stats.ttest_rel(x[0, 0], x[1, 0])

    assert found.covers == "seeds"
    assert found.variance_seeds == pytest.approx(exact.variance_seeds, rel=0.02)
    assert exact.p_value() == pytest.approx(theirs.pvalue)
    assert exact.interval() == pytest.approx(tuple(theirs.confidence_interval(0.95)))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_limits_of_one_kind_of_chance_are_scipys(level):
    """Student's t, of seeds or of prompts."""
    by_seeds, by_prompts = Estimate(1.0, 0.04, None, seeds=4, prompts=0), Estimate(1.0, 0.0, 0.09, seeds=4, prompts=7)

    assert by_seeds.interval(level) == pytest.approx(stats.t.interval(level, 3, loc=1.0, scale=0.2))
    assert by_prompts.interval(level) == pytest.approx(stats.t.interval(level, 7, loc=1.0, scale=0.3))
    assert by_seeds.p_value() == pytest.approx(2 * stats.t.sf(5.0, 3))
    assert by_prompts.p_value() == pytest.approx(2 * stats.t.sf(1.0 / 0.3, 7))


def test_an_interval_by_hand():
    """t(1) = 12.7062, t(10) = 2.2281: the root of 12.7062^2 x 0.04 + 2.2281^2 x 0.02 is 2.5607."""
    found = Estimate(1.0, 0.04, 0.02, seeds=2, prompts=10)

    assert found.interval() == pytest.approx((-1.5607, 3.5607), abs=1e-4)
    assert found.covers == "seeds and prompts"


def test_intervals_of_three_seeds_are_calibrated():
    """Narrower than each part's t makes them (0.9165: 4.3027^2 x 0.04 + 2.2281^2 x 0.02), wider than their variance."""
    low, high = Estimate(1.0, 0.04, 0.02, seeds=3, prompts=10).interval()

    assert 1.96 * 0.06**0.5 < (high - low) / 2 < 0.9165
    assert (low + high) / 2 == pytest.approx(1.0)


@pytest.mark.parametrize("value", [1.0, 0.2, -3.0, 30.0])
def test_the_p_value_is_where_the_interval_touches_zero(value):
    """At the level of one less the p-value: of two seeds, whose intervals are not calibrated."""
    found = Estimate(value, 0.04, 0.02, seeds=2, prompts=10)

    low, high = found.interval(1.0 - found.p_value())
    assert min(abs(low), abs(high)) == pytest.approx(0.0, abs=1e-6 * abs(value))


def test_one_seed_has_no_interval():
    """However many prompts there are: it says nothing of another run."""
    found = estimate([drawn(7, 2, 6, 1)], difference)

    assert (found.interval(), found.p_value(), found.detectable()) == ((None, None), None, None)
    assert found.covers == "nothing: one seed"


def test_no_difference_at_all_is_no_finding():
    """Two names of one thing, measured under the same draws."""
    x = drawn(8, 1, 6, 3)

    found = estimate([np.concatenate([x, x])], difference)
    assert (found.value, found.interval(), found.p_value()) == (0.0, (0.0, 0.0), 1.0)


# -- how many seeds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
@pytest.mark.parametrize("level", [0.95, 0.9875])
def test_power_over_seeds_is_that_of_the_noncentral_t(seeds, level):
    """One kind of chance: the test is Student's, and its power known."""
    known = Estimate(0.0, 1.0 / seeds, None, seeds, 0)
    bound = stats.t.ppf(0.5 + level / 2, seeds - 1)
    found = known.detectable(level=level)

    for difference in (0.0, 0.5, found):
        exact = stats.nct.sf(bound, seeds - 1, difference * math.sqrt(seeds))
        assert known.power(difference, level=level) == pytest.approx(exact, abs=1e-3)
    assert known.power(found, level=level) == pytest.approx(0.8, abs=1e-9)


def test_detectable_difference_is_found_as_often_as_promised():
    """Of 2,000 runs of three seeds with a true difference of that size: 80 %, within three standard deviations."""
    deviation, seeds = 1.0, 3
    known = Estimate(0.0, deviation**2 / seeds, None, seeds, 0)
    runs = np.random.default_rng(9).normal(known.detectable(), deviation, size=(2000, seeds))

    found = np.mean([stats.ttest_1samp(run, 0.0).pvalue < 0.05 for run in runs])
    assert found == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 2000))


def test_power_over_seeds_and_prompts_is_that_of_simulated_limits():
    """Variances as uncertain as chi-squared makes them; 20,000 runs, three standard deviations."""
    known, runs = Estimate(0.0, 0.04, 0.02, seeds=3, prompts=10), 20_000
    source = np.random.default_rng(10)
    reached = source.normal(1.0, math.sqrt(0.06), runs)
    by_seeds, by_prompts = (v * source.chisquare(d, runs) / d for v, d in ((0.04, 2), (0.02, 10)))
    half = np.sqrt(stats.t.ppf(0.975, 2) ** 2 * by_seeds + stats.t.ppf(0.975, 10) ** 2 * by_prompts)

    share = np.mean(reached > half)
    assert known.power(1.0) == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / runs))
    assert known.power(-1.0) == known.power(1.0)


def test_power_grows_with_the_difference_and_the_seeds():
    """From a level's half, at no difference, to certainty."""
    pilot = Estimate(0.5, 0.04, 0.02, seeds=3, prompts=10)

    by_difference = [pilot.power(difference) for difference in (0.0, 0.2, 0.5, 1.0, 3.0)]
    by_seeds = [pilot.power(0.5, seeds) for seeds in (2, 3, 4, 5, 10, 30, 100, 1000)]
    assert by_difference == sorted(by_difference) and by_seeds == sorted(by_seeds)
    assert by_difference[0] < 0.025 and by_difference[-1] > 0.999
    # with a thousand seeds it is the prompts' chance alone that is left
    limit = stats.nct.sf(stats.t.ppf(0.975, 10), 10, 0.5 / math.sqrt(0.02))
    assert by_seeds[-1] == pytest.approx(limit, abs=0.01)


def test_more_seeds_find_less():
    """By their own part of the variance; the prompts' part stays."""
    pilot = Estimate(0.5, 0.04, 0.02, seeds=3, prompts=10)

    needed = pilot.seeds_for(0.5)
    assert pilot.detectable(needed) <= 0.5 < pilot.detectable(needed - 1)
    assert pilot.detectable(1000) > pilot.detectable(1001) > Estimate(0.5, 0.0, 0.02, 3, 10).detectable() > 0.43
    assert pilot.seeds_for(0.3) is None
    assert pilot.seeds_for(0.5, most=needed) == needed and pilot.seeds_for(0.5, most=needed - 1) is None


def test_nothing_that_varies_is_found_by_two_seeds():
    """And no difference by none."""
    still = Estimate(0.5, 0.0, 0.0, seeds=3, prompts=10)

    assert (still.detectable(), still.seeds_for(0.1), still.seeds_for(0.0)) == (0.0, 2, None)
    assert Estimate(0.5, None, None, 1, 10).seeds_for(0.1) is None


def test_a_cautious_estimate_holds_the_true_variance_in_four_of_five_pilots():
    """Of 20,000 pilots of three seeds and ten prompts beyond the first: each part by itself."""
    source = np.random.default_rng(11)
    pilots = zip(source.chisquare(2, 20_000) / 2, source.chisquare(10, 20_000) / 10, strict=True)

    raised = [Estimate(0.0, seeds, prompts, 3, 10).cautious() for seeds, prompts in pilots]
    shares = np.mean([[e.variance_seeds >= 1.0, e.variance_prompts >= 1.0] for e in raised], axis=0)
    assert shares == pytest.approx(0.8, abs=3 * math.sqrt(0.16 / 20_000))
    assert Estimate(0.5, None, None, 1, 10).cautious() == Estimate(0.5, None, None, 1, 10)


# -- Holm --------------------------------------------------------------------------------------------------------


def test_holm_by_hand():
    """0.01 x 4; 0.02 x 3; 0.03 x 2 which 0.06 holds up; 0.5 x 1."""
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])


def test_holm_leaves_out_what_was_not_tested():
    """Two tests are two tests."""
    assert holm([None, 0.04, None, 0.9]) == [None, pytest.approx(0.08), None, pytest.approx(0.9)]
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_of_a_table_that_others_publish():
    """R's p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm"): 0.01 x 5, 0.02 x 4, 0.03 x 3, then held up."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])


@pytest.mark.parametrize("seed", range(5))
def test_holm_rejects_what_the_step_down_procedure_rejects(seed):
    """Holm 1979 as published: the k-th least of m against level / (m - k + 1), until the first that is not below."""
    p_values = list(np.random.default_rng(seed).uniform(size=8) ** 4)
    corrected = holm(p_values)

    for level in (0.001, 0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for rank, index in enumerate(sorted(range(8), key=p_values.__getitem__)):
            if p_values[index] > level / (8 - rank):
                break
            rejected.add(index)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected
