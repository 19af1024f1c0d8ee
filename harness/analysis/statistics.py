"""Intervals and tests for paired measurements: how sure is a difference, and of what? No torch, no files.

Every defense meets the same concepts, prompts and seeds, so what is compared is paired in all three. Concepts are the
ones that were chosen: nothing here speaks of others. Prompts and seeds are drawn, crossed with each other (each prompt
is asked in each seed), and both bring chance:

    seeds    another run of defense, attack and sampling, under the same prompts
    prompts  other evaluation prompts of the same kind, asked of the same adapted models

The variance that seeds bring is estimated by a bootstrap over seeds (Efron and Tibshirani 1993); what prompts bring
beside it, by one over prompts within concepts, less what stays in the cells when both are taken out, which the one over
seeds holds already (crossed factors: Owen 2007). One unit less than there are is drawn each time, which makes the
variance of a mean unbiased (Rao and Wu 1988). Percentiles of a bootstrap of three seeds are far too narrow, so limits
are those of Student's t of each part, put together as squares (Zou and Donner 2008):

    half width^2 = t(seeds - 1)^2 V_seeds + t(prompts - concepts)^2 V_prompts

From three seeds up intervals are calibrated so that they hold as often as stated. Tests of a difference keep the limits
above: their claims are false less often than their level, whichever kind of chance dominates
(`harness.analysis.limits`). So where both kinds matter, an interval may exclude zero although p is a little above its
level. One t at Satterthwaite's (1946) degrees of freedom would hold 88 % with two seeds that bring most of the chance:
it treats a variance that is estimated small as one that is well known. `tests/benchmarks/coverage.py` measures how
often intervals hold the truth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from harness.analysis import limits

Statistic = Callable[[np.ndarray], np.ndarray]
"""[draws, concepts, quantities, seeds], means over prompts -> [draws]."""
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A statistic with its variances."""

    value: float
    variance_seeds: float | None  # None: fewer than two seeds, which allow no claim about another run
    variance_prompts: float | None  # beside the seeds'; None: fewer than two prompts of a concept
    seeds: int
    prompts: int  # beyond the first of each concept

    @property
    def covers(self) -> str:
        """What the interval covers, in words."""
        if self.variance_seeds is None:
            return "nothing: one seed"
        return "seeds" if self.variance_prompts is None else "seeds and prompts"

    def interval(self, level: float = 0.95) -> tuple[float | None, float | None]:
        """Return the interval of a level, calibrated; (None, None) for one seed."""
        if self.variance_seeds is None:
            return None, None
        parts, p = self._parts(self.seeds), 1 - level
        if len(parts) == 2:
            (first, of_seeds), (second, of_prompts) = parts
            p = float(limits.nominal(of_seeds / (of_seeds + of_prompts), (first, second), p))
        half = self._reach(lambda degrees: _quantile(degrees, 1 - p / 2))
        return self.value - half, self.value + half

    def p_value(self) -> float | None:
        """Return the least p at which limits of level 1 - p, not calibrated, leave zero out.

        None for one seed; 1 where nothing differs at all.
        """
        if self.variance_seeds is None:
            return None
        if self._reach(lambda degrees: 1.0) == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        low, high = -40.0, 0.0  # of ln p
        for _ in range(60):
            middle = (low + high) / 2
            tail = math.exp(middle) / 2
            half = self._reach(lambda degrees, tail=tail: -_quantile(degrees, tail))
            low, high = (middle, high) if half > abs(self.value) else (low, middle)
        return math.exp(high)

    def power(self, difference: float, seeds: int | None = None, level: float = 0.95) -> float | None:
        """Return the chance that a test at `level` calls a true difference of that size by its side; None: one seed.

        With so many seeds and the variances as estimated, for chance that is normal: the limits are as uncertain as
        variances from so few seeds and prompts are, so the mean is taken over their distributions. (The usual sum of
        two quantiles of t promises 80 % where three seeds give 71 %, at a level corrected for four tests.)
        """
        seeds = seeds or self.seeds
        if self.variance_seeds is None or seeds < 2:
            return None
        parts = self._parts(seeds)
        variance = sum(part for _, part in parts)
        if variance == 0.0:
            return float(difference != 0.0)
        squares = np.zeros(1)
        for degrees, part in parts:
            squares = np.add.outer(squares, part * _quantile(degrees, 0.5 + level / 2) ** 2 * _spread(degrees)).ravel()
        return float(np.mean(_normal((abs(difference) - np.sqrt(squares)) / math.sqrt(variance))))

    def detectable(self, seeds: int | None = None, power: float = 0.8, level: float = 0.95) -> float | None:
        """Return the least difference that a test at `level` finds with probability `power`, with so many seeds."""
        if self.power(0.0, seeds, level) is None:
            return None
        low, high = 0.0, math.sqrt(sum(part for _, part in self._parts(seeds or self.seeds)))
        if high == 0.0:
            return 0.0
        while self.power(high, seeds, level) < power:
            low, high = high, 2 * high
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.power(middle, seeds, level) < power else (low, middle)
        return high

    def seeds_for(self, difference: float, power: float = 0.8, level: float = 0.95, most: int = 1000) -> int | None:
        """Return how many seeds find a difference; None: not even `most` do, or there is no variance to go by."""
        found = self.power(difference, most, level)
        if found is None or found < power:
            return None
        low, high = 1, most  # more seeds find more: their variance falls, and is better known
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(difference, middle, level) >= power else (middle, high)
        return high

    def cautious(self, confidence: float = 0.8) -> Estimate:
        """Return the estimate with variances at their upper limits, for planning (Browne 1995).

        Variances from few seeds are often far too small. In a share `confidence` of pilots the truth is below this
        limit.
        """
        from scipy.special import chdtri

        if self.variance_seeds is None:
            return self
        raised = self.variance_seeds * (self.seeds - 1) / float(chdtri(self.seeds - 1, confidence))
        prompts = self.variance_prompts
        if prompts is not None:
            prompts *= self.prompts / float(chdtri(self.prompts, confidence))
        return replace(self, variance_seeds=raised, variance_prompts=prompts)

    def _parts(self, seeds: int) -> list[tuple[int, float]]:
        """Return (degrees of freedom, variance) of each kind of chance, with so many seeds."""
        parts = [(seeds - 1, self.variance_seeds * self.seeds / seeds)]
        if self.variance_prompts:  # does not shrink with more seeds
            parts.append((self.prompts, self.variance_prompts))
        return parts

    def _reach(self, multiple: Callable[[int], float]) -> float:
        """Return the root of the sum of (multiple of a part's degrees of freedom)^2 * its variance."""
        return math.sqrt(sum(multiple(degrees) ** 2 * part for degrees, part in self._parts(self.seeds)))


def estimate(cells: Sequence[np.ndarray], statistic: Statistic, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Estimate a statistic of measurements.

    `cells` holds for each concept an array [quantities, prompts, seeds]: the same quantities and seeds for every
    concept, separate prompts. `draws` bootstrap samples of each kind come from `seed`.
    """
    seeds, prompts = cells[0].shape[2], tuple(x.shape[1] for x in cells)
    value = float(statistic(_averaged(cells))[0])
    beyond = sum(count - 1 for count in prompts)
    if seeds < 2:
        return Estimate(value, None, None, seeds, beyond)
    drawn = _drawn(seed, draws, seeds, prompts)
    by_seeds = _over_seeds(cells, statistic, drawn)
    if min(prompts) < 2:
        return Estimate(value, by_seeds, None, seeds, beyond)
    own = _over_prompts(cells, statistic, drawn) - _over_cells(cells, statistic, drawn)
    return Estimate(value, by_seeds, max(own, 0.0), seeds, beyond)


@dataclass(frozen=True)
class _Drawn:
    """Bootstrap samples for measurements of one shape: what is drawn does not depend on what was measured."""

    seeds: np.ndarray  # [draws, seeds - 1]
    prompts: list[np.ndarray]  # of each concept the share of every prompt, [draws, prompts]
    cells: list[np.ndarray]  # of each concept places among its cells, [prompts, draws, seeds]


@functools.lru_cache(maxsize=4)  # comparisons alternate between few shapes: targets and innocents
def _drawn(seed: int, draws: int, seeds: int, prompts: tuple[int, ...]) -> _Drawn:
    source = np.random.default_rng(seed)
    of_seeds = source.integers(seeds, size=(draws, seeds - 1))
    if min(prompts) < 2:
        return _Drawn(of_seeds, [], [])
    of_prompts, of_cells = [], []
    for count in prompts:
        chosen = source.integers(count, size=(draws, count - 1))
        weights = np.zeros((draws, count))
        np.add.at(weights, (np.arange(draws)[:, None], chosen), 1.0 / (count - 1))
        of_prompts.append(weights)
    for count in prompts:
        chosen = source.integers(count * seeds, size=(draws, count, seeds))
        of_cells.append(np.ascontiguousarray(chosen.swapaxes(0, 1)))
    return _Drawn(of_seeds, of_prompts, of_cells)


def _averaged(cells: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([x.mean(axis=1) for x in cells])[None]


def _over_seeds(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    means = _averaged(cells)[0]  # [concepts, quantities, seeds]
    return float(np.var(statistic(np.moveaxis(means[:, :, drawn.seeds], 2, 0)), ddof=1))


def _over_prompts(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    means = [np.einsum("dp,qps->dqs", weights, x) for weights, x in zip(drawn.prompts, cells, strict=True)]
    return float(np.var(statistic(np.stack(means, axis=1)), ddof=1))


def _over_cells(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    """Draw what is left in the cells, once seeds and prompts are taken out, anew beside what they explain."""
    draws, (quantities, _, seeds) = len(drawn.seeds), cells[0].shape
    means = np.empty((draws, len(cells), quantities, seeds))
    for place, (x, chosen) in enumerate(zip(cells, drawn.cells, strict=True)):
        prompts = x.shape[1]
        by_seed, by_prompt = x.mean(axis=1, keepdims=True), x.mean(axis=2, keepdims=True)
        left = x - by_seed - by_prompt + x.mean(axis=(1, 2), keepdims=True)
        left = left * math.sqrt(prompts * seeds / ((prompts - 1) * (seeds - 1)))
        flat = left.reshape(quantities, prompts * seeds)
        noise = flat.take(chosen[0], axis=1)  # [quantities, draws, seeds]
        for places in chosen[1:]:  # prompt by prompt: all at once needs the memory of all
            noise += flat.take(places, axis=1)
        noise /= prompts
        np.add(by_seed[:, 0][None], np.moveaxis(noise, 1, 0), out=means[:, place])
    return float(np.var(statistic(means), ddof=1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's (1979) corrected p-values: the chance that any of the tests calls chance a difference is kept.

    What was not tested (None) stays so and does not count.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, index) in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * p))
        corrected[index] = greatest
    return corrected


def _quantile(degrees: float, probability: float) -> float:
    from scipy.special import stdtrit  # the quantile alone: scipy.stats takes a second to import

    return float(stdtrit(degrees, probability))


def _normal(values: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(values)


@functools.cache
def _spread(degrees: int, points: int = 64) -> np.ndarray:
    """Return an estimated variance over the true one, at evenly spaced quantiles: chi-squared over its degrees."""
    from scipy.special import chdtri

    return chdtri(degrees, (np.arange(points) + 0.5) / points) / degrees
