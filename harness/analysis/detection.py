"""How well scores of prompts separate memorized ones from others: ROC, AUC, accuracy, and their intervals. Pure.

Curves have scikit-learn's convention: a point for each different score as threshold, from the greatest down, with
(0, 0) before them; a prompt is found where its score is at least the threshold. All points are kept, so a rate that is
read off can be greater than from a curve without its points on straight parts (`drop_intermediate`, the default there).

Intervals are of the mean over seeds of a statistic. Chance is in the seeds of drawing and in the prompts, of both kinds
apart. Each bootstrap sample draws prompts of each kind and seeds with replacement; seeds are few, so the sample's
deviation from its mean is enlarged by sqrt(n / (n - 1)), and limits are percentiles of the samples (Efron and
Tibshirani 1993), held in [0, 1]. With one seed they cover chance in the prompts alone. They never cover chance in
training the memorizing model. A statistic that is 1 in every sample has the interval from 1 to 1: no error was seen,
and 3 / n is an upper limit of its rate.

How often they hold the truth (tests/benchmarks/detection_coverage.py, three seeds; 24 memorized prompts against 60,
then 200 against 500): AUC 96 %, 95 to 97 %; TPR strictly below 93 to 96 %, above 99 %. Two statistics are too high for
few prompts, and their intervals too short. Balanced accuracy is of the best threshold on the same prompts: by .02 to
.04, held by 72 to 76 %; then by .01, 79 to 90 %. TPR at the nearest point: of 60 negatives one is 1.7 %, which is
nearest to 1 %, so it is too high by .09 to .13, held by 85 to 92 %; then by .01, 97 to 98 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
FPR = 0.01
"""The rate of false alarms at which detectors are compared."""
BELOW, NEAREST = "below", "nearest"
_BLOCK = 200
"""So many bootstrap samples are computed together: 1000 prompts of each kind then take some ten megabytes."""


@dataclass(frozen=True)
class Measured:
    """A statistic with its 95 % interval; limits are None where a kind has fewer than two prompts."""

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
    scores = _sign(direction) * np.concatenate([positives.ravel(), negatives.ravel()])
    return scores, np.concatenate([np.ones(positives.size), np.zeros(negatives.size)])


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the area under the curve: the share of pairs that are in order, ties half; scores are [prompts]."""
    return float(_aucs(*_whole(positives, negatives))[0])


def balanced_accuracy(positives: np.ndarray, negatives: np.ndarray) -> float:
    """Return the greatest 1 - (FPR + FNR) / 2 over thresholds."""
    return float(_accuracies(*_whole(positives, negatives))[0])


def tpr_at(positives: np.ndarray, negatives: np.ndarray, fpr: float = FPR, convention: str = BELOW) -> float:
    """Return the true positive rate at a false positive rate.

    below: at the last point of the curve whose rate is strictly below (Wen et al.); nearest: at the point whose rate is
    nearest (SAIL), the last of several, since the first one of few negatives is (0, 0).
    """
    return float(_tprs(*_whole(positives, negatives), fpr, convention)[0])


def measured(
    positives: np.ndarray, negatives: np.ndarray, direction: str = "higher", draws: int = DRAWS
) -> dict[str, Measured]:
    """Return name -> statistic with its interval: auc, balanced_accuracy, tpr_below, tpr_nearest.

    `positives`, `negatives`: [seeds, prompts] of scores of memorized prompts and of others. `direction`: "lower" where
    less means memorized; the result never decides it.
    """
    sign = _sign(direction)
    pairs = list(zip(sign * positives, sign * negatives, strict=True))
    wholes = [_whole(*pair) for pair in pairs]
    values = {name: float(np.mean([of(*whole)[0] for whole in wholes])) for name, of in _STATISTICS.items()}
    if min(positives.shape[1], negatives.shape[1]) < 2:
        return {name: Measured(value, None, None) for name, value in values.items()}
    seeds = len(pairs)
    source = np.random.default_rng(0)
    shares = [_drawn(source, draws, each.shape[1]) for each in (positives, negatives)]
    chosen = _drawn(source, draws, seeds)  # [draws, seeds]
    in_samples: dict[str, list[np.ndarray]] = {name: [] for name in _STATISTICS}
    for pair in pairs:
        # some draws at a time: a curve has a point for each prompt, in every one
        made: dict[str, list[np.ndarray]] = {name: [] for name in _STATISTICS}
        for first in range(0, draws, _BLOCK):
            curve = _curves(*pair, *(share[first : first + _BLOCK] for share in shares))
            for name, of in _STATISTICS.items():
                made[name].append(of(*curve))
        for name, listed in made.items():
            in_samples[name].append(np.concatenate(listed))
    found = {}
    for name, value in values.items():
        each = np.stack(in_samples[name], axis=1)  # [draws, seeds]
        samples = centre = each.mean(axis=1)
        if seeds > 1:
            spread = (chosen * (each - centre[:, None])).sum(axis=1) / seeds
            samples = centre + spread * np.sqrt(seeds / (seeds - 1))
        low, high = np.clip(np.quantile(samples, (0.025, 0.975)), 0.0, 1.0)
        found[name] = Measured(value, float(min(low, value)), float(max(high, value)))
    return found


def _sign(direction: str) -> float:
    if direction not in ("higher", "lower"):
        raise ValueError(f"unknown direction {direction!r}; known: higher, lower")
    return 1.0 if direction == "higher" else -1.0


def _whole(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the curve of all prompts, each once: [1, thresholds + 1]."""
    return _curves(positives, negatives, np.ones((1, len(positives))), np.ones((1, len(negatives))))


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


def _aucs(false: np.ndarray, true: np.ndarray) -> np.ndarray:
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


_STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "auc": _aucs,
    "balanced_accuracy": _accuracies,
    "tpr_below": lambda false, true: _tprs(false, true, FPR, BELOW),
    "tpr_nearest": lambda false, true: _tprs(false, true, FPR, NEAREST),
}
