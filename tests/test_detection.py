"""How well scores separate memorized prompts from others: curves as scikit-learn's, both conventions, intervals."""

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


@pytest.mark.parametrize(("seeds", "ties"), [(1, False), (3, True)])
def test_intervals_are_those_of_a_plain_bootstrap(seeds, ties):
    """Prompts of each kind and seeds are drawn again; every sample's statistics are scikit-learn's."""
    source = np.random.default_rng(4)
    both = source.normal(1, 1, (seeds, 20)), source.normal(0, 1, (seeds, 30))
    both = [np.round(each, 1 if ties else 9) for each in both]
    draws = 40
    found = detection.measured(*both, draws=draws)

    source = np.random.default_rng(0)
    counts = [source.multinomial(n, np.full(n, 1 / n), size=draws) for n in (20, 30)]
    chosen = source.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    samples = np.empty((draws, 4))
    for draw in range(draws):
        each = []
        for positives, negatives in zip(*both, strict=True):
            drawn = np.repeat(positives, counts[0][draw]), np.repeat(negatives, counts[1][draw])
            values, labels = detection.pooled(*drawn)
            false, true, _ = sklearn_metrics.roc_curve(labels, values, drop_intermediate=False)
            away = np.abs(false - 0.01)
            area = sklearn_metrics.roc_auc_score(labels, values)
            best = np.max(1 - (false + 1 - true) / 2)
            each.append([area, best, true[false < 0.01].max(), true[np.isclose(away, away.min())].max()])
        deviations = np.array(each) - np.mean(each, axis=0)
        factor = np.sqrt(seeds / (seeds - 1)) if seeds > 1 else 0
        samples[draw] = np.mean(each, axis=0) + factor * (chosen[draw][:, None] * deviations).mean(axis=0)
    for place, name in enumerate(("auc", "balanced_accuracy", "tpr_below", "tpr_nearest")):
        low, high = np.clip(np.quantile(samples[:, place], (0.025, 0.975)), 0, 1)
        value = found[name].value
        assert (found[name].low, found[name].high) == pytest.approx((min(low, value), max(high, value)))


def test_many_draws_are_those_of_one_block(monkeypatch):
    """Samples are computed some at a time, which changes no number."""
    source = np.random.default_rng(5)
    both = source.normal(1, 1, (2, 9)), source.normal(0, 1, (2, 11))
    whole = detection.measured(*both, draws=70)
    monkeypatch.setattr(detection, "_BLOCK", 32)

    assert detection.measured(*both, draws=70) == whole


def test_one_prompt_of_a_kind_has_no_interval():
    """Chance in prompts cannot be seen."""
    found = detection.measured(np.array([[3.0]]), np.array([[1.0, 2.0]]))

    assert all((each.value, each.low, each.high) == (1.0, None, None) for each in found.values())


def test_an_unknown_direction_is_refused():
    """It is not taken for the usual one, which would turn the result round."""
    for of in (detection.measured, detection.pooled):
        with pytest.raises(ValueError, match="unknown direction 'less'"):
            of(*(np.ones((1, 3)),) * 2, "less")


def test_area_of_the_interval_covers_the_truth():
    """In repeated experiments with a known AUC the interval holds it about as often as stated.

    300 experiments: the binomial standard deviation of a true 95 % is 1.3 points; with 3 seeds and 40 prompts a kind
    the percentile interval is known to be somewhat short, so at least 88 % (more than five deviations above a 75 %
    interval).
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
