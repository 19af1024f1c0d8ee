"""How well scores of prompts separate memorized ones from others: ROC, AUC, accuracy, and their intervals. Pure.

Curves have scikit-learn's convention: a point for each different score as threshold, from the greatest down, with
(0, 0) before them; a prompt is found where its score is at least the threshold.

Intervals are of the mean over seeds of a statistic. Chance is in the seeds of drawing and in the prompts, of both kinds
apart. Each bootstrap sample draws prompts of each kind and seeds with replacement; seeds are few, so the sample's
deviation from its mean is enlarged by sqrt(n / (n - 1)), and limits are percentiles of the samples (Efron and
Tibshirani 1993), held in [0, 1]. They do not cover chance in training the memorizing model. A statistic that is 1 in
every sample has the interval from 1 to 1: no error was seen, and 3 / n is an upper limit of its rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
FPR = 0.01
"""The rate of false alarms at which detectors are compared."""
BELOW, NEAREST = "below", "nearest"


@dataclass(frozen=True)
class Measured:
    """A statistic with its 95 % interval; limits are None for one seed and fewer than two prompts of a kind."""

    value: float
    low: float | None
    high: float | None


def roc(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (false positive rates, true positive rates, thresholds) of scores [prompts]; labels: memorized or not."""
    order = np.argsort(-scores, kind="stable")
    ordered, is_positive = scores[order], labels[order].astype(bool)
    last = np.flatnonzero(np.append(np.diff(ordered) != 0, True))
    true = np.cumsum(is_positive)[last]
    false = 1 + last - true
    rates = (np.concatenate([[0], each]) / max(each[-1], 1) for each in (false, true))
    return (*rates, np.concatenate([[np.inf], ordered[last]]))


def pooled(positives: np.ndarray, negatives: np.ndarray, direction: str = "higher") -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, labels) of all seeds together, greater scores for memorized: arguments as of `measured`."""
    sign = -1.0 if direction == "lower" else 1.0
    scores = sign * np.concatenate([positives.ravel(), negatives.ravel()])
    return scores, np.concatenate([np.ones(positives.size), np.zeros(negatives.size)])


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the area under the curve: the share of pairs that are in order, ties half; scores are [prompts]."""
    return float(_aucs(positives[None], negatives[None], _once(positives), _once(negatives))[0])


def balanced_accuracy(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the greatest 1 - (FPR + FNR) / 2 over thresholds."""
    return float(_accuracies(*_curves(positives, negatives, _once(positives), _once(negatives)))[0])


def tpr_at(positives: np.ndarray, negatives: np.ndarray, fpr: float = FPR, convention: str = BELOW) -> float:
    """Return the true positive rate at a false positive rate.

    below: at the last point of the curve whose rate is strictly below (Wen et al.); nearest: at the point whose rate is
    nearest (SAIL), the last of several, since the first one of few negatives is (0, 0).
    """
    return float(_tprs(*_curves(positives, negatives, _once(positives), _once(negatives)), fpr, convention)[0])


def measured(
    positives: np.ndarray, negatives: np.ndarray, direction: str = "higher", draws: int = DRAWS
) -> dict[str, Measured]:
    """Return name -> statistic with its interval: auc, balanced_accuracy, tpr_below, tpr_nearest.

    `positives`, `negatives`: [seeds, prompts] of scores of memorized prompts and of others. `direction`: "lower" where
    less means memorized; the result never decides it.
    """
    sign = -1.0 if direction == "lower" else 1.0
    positives, negatives = sign * positives, sign * negatives
    seeds = len(positives)
    source = np.random.default_rng(0)
    shares = [_drawn(source, draws, each.shape[1]) for each in (positives, negatives)]
    chosen = _drawn(source, draws, seeds)  # [draws, seeds]
    found = {}
    for name, statistic in _STATISTICS.items():
        pairs = list(zip(positives, negatives, strict=True))
        value = float(np.mean([statistic(*pair, *map(_once, pair))[0] for pair in pairs]))
        if min(positives.shape[1], negatives.shape[1]) < 2:
            found[name] = Measured(value, None, None)
            continue
        each = np.stack([statistic(*pair, *shares) for pair in pairs], axis=1)
        if seeds > 1:
            centre = each.mean(axis=1, keepdims=True)
            spread = (chosen * (each - centre)).sum(axis=1) / seeds * np.sqrt(seeds / (seeds - 1))
            samples = centre[:, 0] + spread
        else:
            samples = each[:, 0]
        low, high = np.clip(np.quantile(samples, (0.025, 0.975)), 0.0, 1.0)
        found[name] = Measured(value, float(min(low, value)), float(max(high, value)))
    return found


def _once(values: np.ndarray) -> np.ndarray:
    """Return the one sample that has every prompt once: [1, prompts]."""
    return np.ones((1, len(values)))


def _drawn(source: np.random.Generator, draws: int, count: int) -> np.ndarray:
    """Return how often each of `count` is in each bootstrap sample: [draws, count]."""
    return source.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)


def _curves(
    positives: np.ndarray, negatives: np.ndarray, of_positives: np.ndarray, of_negatives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (false, true positive rates), each [draws, thresholds + 1], at all thresholds of the whole data.

    `of_positives`, `of_negatives`: how often each prompt is in a sample. Thresholds that a sample does not have repeat
    the point before them.
    """
    thresholds = np.unique(np.concatenate([positives, negatives]))[::-1]
    rates = []
    for values, counts in ((negatives, of_negatives), (positives, of_positives)):
        order = np.argsort(-values, kind="stable")
        reached = np.searchsorted(-values[order], -thresholds, side="right")
        summed = np.concatenate([np.zeros((len(counts), 1)), np.cumsum(counts[:, order], axis=1)], axis=1)
        rates.append(np.concatenate([np.zeros((len(counts), 1)), summed[:, reached]], axis=1) / summed[:, -1:])
    return rates[0], rates[1]


def _aucs(
    positives: np.ndarray, negatives: np.ndarray, of_positives: np.ndarray, of_negatives: np.ndarray
) -> np.ndarray:
    false, true = _curves(positives.ravel(), negatives.ravel(), of_positives, of_negatives)
    return (np.diff(false, axis=1) * (true[:, 1:] + true[:, :-1]) / 2).sum(axis=1)


def _accuracies(false: np.ndarray, true: np.ndarray) -> np.ndarray:
    return (1 - (false + 1 - true) / 2).max(axis=1)


def _tprs(false: np.ndarray, true: np.ndarray, fpr: float, convention: str) -> np.ndarray:
    if convention == BELOW:
        return np.where(false < fpr, true, 0.0).max(axis=1)
    if convention != NEAREST:
        raise ValueError(f"unknown convention {convention!r}; known: {BELOW}, {NEAREST}")
    away = np.abs(false - fpr)
    return np.where(away <= away.min(axis=1, keepdims=True) + 1e-12, true, 0.0).max(axis=1)


_STATISTICS: dict[str, Callable[..., np.ndarray]] = {
    "auc": _aucs,
    "balanced_accuracy": lambda *given: _accuracies(*_curves(*given)),
    "tpr_below": lambda *given: _tprs(*_curves(*given), FPR, BELOW),
    "tpr_nearest": lambda *given: _tprs(*_curves(*given), FPR, NEAREST),
}
