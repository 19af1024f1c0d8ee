"""How well scores separate memorized prompts: curves as scikit-learn's, both conventions of TPR, intervals."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics

from harness.analysis import detection


def scores(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 57 memorized prompts and of 131 others, with or without ties."""
    source = np.random.default_rng(seed)
    digits = 1 if ties else 9
    return np.round(source.normal(1, 1, 57), digits), np.round(source.normal(0, 1, 131), digits)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_curve_and_statistics_are_scikit_learns(seed, ties):
    """Every point of the curve, the area, and what Wen et al. read off it."""
    positives, negatives = scores(seed, ties)
    values, labels = detection.pooled(positives, negatives)
    false, true, thresholds = sklearn_metrics.roc_curve(labels, values, drop_intermediate=False)

    found = detection.roc(values, labels)
    assert all(np.allclose(own, other) for own, other in zip(found, (false, true, thresholds), strict=True))
    assert detection.auc(positives, negatives) == pytest.approx(sklearn_metrics.roc_auc_score(labels, values))
    assert detection.balanced_accuracy(positives, negatives) == pytest.approx(np.max(1 - (false + 1 - true) / 2))
    assert detection.tpr_at(positives, negatives) == pytest.approx(true[np.where(false < 0.01)[0][-1]])


def test_strictly_below_one_percent_by_hand():
    """Of 200 others 1 % are 2: strictly below allows one false alarm, the nearest point allows two."""
    negatives = np.concatenate([[9.0, 7.0, 5.0], np.zeros(197)])
    positives = np.array([10.0, 8.0, 6.0, 4.0])

    # one false alarm (9): found are 10 and 8; two (9 and 7): 6 too; 4 needs three
    assert detection.tpr_at(positives, negatives, convention="below") == 0.5
    assert detection.tpr_at(positives, negatives, convention="nearest") == 0.75


def test_few_negatives_allow_no_false_alarm():
    """Of 50 others each is 2 %: both conventions read the curve where no alarm is false, at its end."""
    positives, negatives = np.array([3.0, 1.0, 0.2]), np.linspace(0, 0.5, 50)

    assert detection.tpr_at(positives, negatives, convention="below") == pytest.approx(2 / 3)
    assert detection.tpr_at(positives, negatives, convention="nearest") == pytest.approx(2 / 3)


def test_less_means_memorized_where_the_detector_says_so():
    """The sign is the detector's: a result below one half stays there."""
    positives, negatives = scores(0, ties=False)
    both = positives[None], negatives[None]

    higher, lower = (detection.measured(*both, direction)["auc"].value for direction in ("higher", "lower"))
    assert higher > 0.5
    assert lower == pytest.approx(1 - higher)


def test_intervals_contain_the_value_and_shrink_with_prompts():
    """Chance of prompts and of seeds; a perfect separation has no spread."""
    source = np.random.default_rng(1)
    few = detection.measured(source.normal(1.5, 1, (3, 20)), source.normal(0, 1, (3, 20)))
    many = detection.measured(source.normal(1.5, 1, (3, 500)), source.normal(0, 1, (3, 500)))

    for found in (*few.values(), *many.values()):
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert few["auc"].high - few["auc"].low > 3 * (many["auc"].high - many["auc"].low)
    perfect = detection.measured(np.full((2, 9), 2.0), np.zeros((2, 9)))["auc"]
    assert (perfect.value, perfect.low, perfect.high) == (1.0, 1.0, 1.0)


def test_area_of_the_interval_covers_the_truth():
    """In repeated experiments with a known AUC the interval holds it about as often as stated.

    300 experiments: the binomial standard deviation of a true 95 % is 1.3 points; with 3 seeds and 40 prompts a kind
    the percentile interval is known to be somewhat short, so at least 88 %: five deviations above a 75 % interval.
    """
    from scipy.stats import norm

    source = np.random.default_rng(2)
    truth = norm.cdf(1 / np.sqrt(2))
    hits = 0
    for _ in range(300):
        of_prompts = source.normal(1, 0.8, 40), source.normal(0, 0.8, 40)
        both = [own + source.normal(0, 0.6, (3, 40)) for own in of_prompts]
        found = detection.measured(*both, draws=400)["auc"]
        hits += found.low <= truth <= found.high
    assert hits / 300 >= 0.88
