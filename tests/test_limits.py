"""Limits of two kinds of chance hold as often as they say, whatever the share of each."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.analysis import limits

DEGREES = [(2, 5), (2, 15), (4, 45), (2, 2), (15, 2)]
DRAWS = 400_000


def drawn(share: float, degrees: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return squared errors and the estimates of both variances, in simulated runs of variance one."""
    source = np.random.default_rng(1)
    first = share * source.chisquare(degrees[0], DRAWS) / degrees[0]
    second = (1 - share) * source.chisquare(degrees[1], DRAWS) / degrees[1]
    return source.normal(size=DRAWS) ** 2, first, second


@pytest.mark.parametrize("degrees", DEGREES)
def test_95_percent_limits_hold_95_percent_of_times(degrees):
    """Between 93 and 97 %, for every share of the first."""
    for share in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0):
        error, first, second = drawn(share, degrees)
        p = limits.nominal(first / (first + second), degrees, 0.05)
        held = error <= stats.t.isf(p / 2, degrees[0]) ** 2 * first + stats.t.isf(p / 2, degrees[1]) ** 2 * second

        assert 0.93 <= held.mean() <= 0.97, share


@pytest.mark.parametrize("degrees", DEGREES)
@pytest.mark.parametrize("p", [0.05, 0.01])
def test_how_often_plain_limits_miss(degrees, p):
    """Simulated; five deviations of a share of the draws."""
    for share in (0.0, 0.05, 0.4, 0.9):
        error, first, second = drawn(share, degrees)
        reach = stats.t.isf(p / 2, degrees[0]) ** 2 * first + stats.t.isf(p / 2, degrees[1]) ** 2 * second
        expected = float(limits.miss(np.array([share]), degrees, p)[0])

        assert np.mean(error > reach) == pytest.approx(expected, abs=5 * (expected / DRAWS) ** 0.5)


@pytest.mark.parametrize("p", [0.5, 0.05, 1e-6])
def test_one_source_alone_is_students_t(p):
    """Whichever it is."""
    assert limits.nominal(np.array([0.0, 1.0]), (2, 9), p) == pytest.approx(p)


def test_sources_may_change_places():
    """The first of one is the second of the other."""
    shares = np.linspace(0, 1, 11)

    assert limits.nominal(shares, (2, 9), 0.05) == pytest.approx(limits.nominal(1 - shares, (9, 2), 0.05), rel=1e-6)


def test_two_seeds_are_not_calibrated():
    """One degree of freedom gives nearly no information on the share."""
    assert limits.nominal(0.4, (1, 9), 0.05) == 0.05
