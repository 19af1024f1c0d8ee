"""`compare` on simulated leaderboards: it does not claim what is not so, and finds what there is."""

from __future__ import annotations

import pytest

from harness.analysis.compare import LEVEL
from tests.simulated import Run, Tuned, claims, ranked_apart

KINDS = {
    "seeds": Run(by_prompt=0.1, by_cell=0.2),
    "both": Run(),
    "prompts": Run(by_seed=0.1, by_prompt=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_defense_under_two_names_is_not_reported_apart(kind):
    """At the 5 % level in no more than 5 % of 200 leaderboards: any verdict of three attacks and their worst case.

    The draws are fixed. Of 2,000 leaderboards it is less too: tests/benchmarks/false_claims.py.
    """
    false, _ = claims(KINDS[kind], 200, seed=0)

    assert false <= LEVEL


@pytest.mark.parametrize("kind", KINDS)
def test_equal_defenses_are_not_ranked_apart(kind):
    """All pairs of three, under three attacks and in the worst case: in no more than 5 % of 100 leaderboards."""
    assert ranked_apart(KINDS[kind], 100, seed=0) <= LEVEL


def test_identical_defenses_tuned_apart_are_not_reported_apart():
    """With one search a seed, the chance of a search is chance between seeds, which intervals cover: at most 5 %.

    With one search for all seeds it is in every seed alike: the same defense tuned twice is called different in more
    than 10 % of 200 leaderboards. So `tuning.per_seed` is true by default.
    """
    each, _ = claims(Tuned(), 200, seed=2)
    one, _ = claims(Tuned(per_seed=False), 200, seed=2)

    # the true share is at most LEVEL; two standard deviations of 200 draws of it are 3 points
    assert each <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / 200) ** 0.5
    assert one > 2 * LEVEL


def test_a_difference_that_should_be_found_is_found():
    """In four of five leaderboards, as `detectable` promises of one test among four; else silence would pass above.

    Give or take three standard deviations of 200; the difference is there for one attack alone, and the others are
    still not claimed to differ.
    """
    run = Run()
    false, found = claims(run, 200, seed=1, stronger_by=run.truth().detectable(level=1 - LEVEL / 4))

    assert found == pytest.approx(0.8, abs=3 * (0.8 * 0.2 / 200) ** 0.5)
    assert false <= LEVEL
