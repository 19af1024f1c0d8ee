"""Trade-offs: who is on the front, who is dominated, what chance explains, and curves at one level."""

from __future__ import annotations

import numpy as np
import pytest

from harness.analysis import statistics, tradeoff


def resampled(means, noise=0.01, seeds=3, prompts=20, seed=0):
    """Measurements around some means, independent noise for each setting."""
    source = np.random.default_rng(seed)
    values = np.array(means)[:, None, None] + noise * source.standard_normal((len(means), prompts, seeds))
    return statistics.resample([values])


def test_front_and_dominated():
    """Lower first, higher second: a worse one in both is dominated, the others are on the front."""
    low, high = resampled([0.8, 0.5, 0.6], seed=1), resampled([30.0, 25.0, 24.0], 0.1, seed=2)

    assert tradeoff.places(["none", "good", "bad"], low, high) == {
        "none": "front", "good": "front", "bad": "dominated",
    }  # fmt: skip


def test_equal_settings_are_tied():
    """Chance explains what differs."""
    low, high = resampled([0.5, 0.5], 0.1, seed=3), resampled([25.0, 25.0], 2.0, seed=4)

    assert set(tradeoff.places(["a", "b"], low, high).values()) == {"tie"}


def test_front_of_the_means():
    """What no other one beats in one without being worse in the other."""
    names = ["none", "good", "bad", "twin", "low"]

    assert tradeoff.front_of_means(names, [0.8, 0.5, 0.6, 0.5, 0.1], [30, 25, 24, 25, 1]) == {
        "none", "good", "twin", "low",
    }  # fmt: skip


def test_one_seed_claims_nothing():
    """No test without a second seed."""
    low = resampled([0.8, 0.5], seeds=1)

    assert tradeoff.places(["a", "b"], low, low) == {"a": "one seed", "b": "one seed"}


def test_curves_are_read_at_one_level():
    """Linear between neighbouring settings; a curve that does not reach the level has no value."""
    low, high = resampled([0.8, 0.4, 0.7], 1e-6), resampled([30.0, 20.0, 29.0], 1e-6)

    found = tradeoff.at_level({"long": [0, 1], "short": [0, 2]}, low, high, 0.6)

    assert found["long"].value == pytest.approx(25.0, abs=1e-3)
    assert found["short"] is None
