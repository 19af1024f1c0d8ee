"""Intervals and tests for paired measurements: how sure is a difference, and under which chance? No torch, no files.

Every defense meets the same concepts, prompts and seeds, so comparisons are paired in all three. Concepts are fixed:
no result extends to others. Prompts and seeds are treated as random draws and are crossed (each prompt is used with
each seed); both bring chance:

    seeds    another run of defense, attack and sampling, under the same prompts
    prompts  other evaluation prompts of the same kind, asked of the same adapted models

The variance from seeds is estimated by a bootstrap over seeds (Efron and Tibshirani 1993). The additional variance from
prompts is estimated by a bootstrap over prompts within concepts, minus the residual variance of the cells without both
effects, which the bootstrap over seeds already contains (crossed factors: Owen 2007). Each sample draws one unit fewer
than there are, which makes the variance of a mean unbiased (Rao and Wu 1988). Bootstrap percentiles of three seeds are
far too narrow, so the limits use Student's t for each part and add their squares (Zou and Donner 2008):

    half width^2 = t(seeds - 1)^2 V_seeds + t(prompts - concepts)^2 V_prompts

With three or more seeds, intervals are calibrated to their stated coverage. Tests of a difference use the uncalibrated
limits above: their claims are false less often than their level for any mix of the two parts
(`harness.analysis.limits`). So where both kinds of chance matter, an interval may exclude zero although p is a little
above the level. A single t with Satterthwaite's (1946) degrees of freedom would cover only 88 % with two seeds that
bring most of the chance: it treats a variance that came out small as one that is well known.
`tests/benchmarks/coverage.py` measures how often intervals contain the truth.
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
    """A statistic, and its variances from seeds and from prompts."""

    value: float
    variance_seeds: float | None  # None: fewer than two seeds, which allow no claim about another run
    variance_prompts: float | None  # added to the seeds'; None: a concept has fewer than two prompts
    seeds: int
    prompts: int  # prompts beyond the first of each concept

    @property
    def covers(self) -> str:
        """The kinds of chance that the interval covers, in words."""
        if self.variance_seeds is None:
            return "nothing: one seed"
        return "seeds" if self.variance_prompts is None else "seeds and prompts"

    def interval(self, level: float = 0.95) -> tuple[float | None, float | None]:
        """Return the calibrated interval of a level; (None, None) for one seed."""
        if self.variance_seeds is None:
            return None, None
        parts, p = self._parts(self.seeds), 1 - level
        if len(parts) == 2:
            (first, of_seeds), (second, of_prompts) = parts
            p = float(limits.nominal(of_seeds / (of_seeds + of_prompts), (first, second), p))
        half = self._reach(lambda degrees: _quantile(degrees, 1 - p / 2))
        return self.value - half, self.value + half

    def p_value(self) -> float | None:
        """Return the least p at which the uncalibrated limits of level 1 - p exclude zero.

        None for one seed; 1 where nothing differs at all.
        """
        if self.variance_seeds is None:
            return None
        if self._reach(lambda degrees: 1.0) == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        low, high = -40.0, 0.0  # bounds of ln p
        for _ in range(60):
            middle = (low + high) / 2
            tail = math.exp(middle) / 2
            half = self._reach(lambda degrees, tail=tail: -_quantile(degrees, tail))
            low, high = (middle, high) if half > abs(self.value) else (low, middle)
        return math.exp(high)

    def power(self, difference: float, seeds: int | None = None, level: float = 0.95) -> float | None:
        """Return the chance that a test at `level` finds a true difference of that size, with its sign; None: one seed.

        Chance is taken as normal, with the variances as estimated. The limits of such a test are uncertain, because
        they use variances from few seeds and prompts; so the chance is averaged over the distributions of these. (The
        usual sum of two t quantiles promises 80 % where three seeds give 71 %, at a level corrected for four tests.)
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
        """Return the least difference that a test at `level` with `seeds` seeds finds with probability `power`."""
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
        """Return how many seeds find a difference; None: more than `most`, or the variance is unknown."""
        found = self.power(difference, most, level)
        if found is None or found < power:
            return None
        low, high = 1, most  # more seeds find more: their variance falls, and is better known
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(difference, middle, level) >= power else (middle, high)
        return high

    def cautious(self, confidence: float = 0.8) -> Estimate:
        """Return the estimate with its variances at their upper limits, for planning (Browne 1995).

        Variances from few seeds are often estimated far too small. The true variance is below its limit in a share
        `confidence` of pilots.
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
        """Return (degrees of freedom, variance) of each kind of chance, with `seeds` seeds."""
        parts = [(seeds - 1, self.variance_seeds * self.seeds / seeds)]
        if self.variance_prompts:  # does not shrink with more seeds
            parts.append((self.prompts, self.variance_prompts))
        return parts

    def _reach(self, multiple: Callable[[int], float]) -> float:
        """Return the root of the sum of (multiple of a part's degrees of freedom)^2 * its variance."""
        return math.sqrt(sum(multiple(degrees) ** 2 * part for degrees, part in self._parts(self.seeds)))


def estimate(cells: Sequence[np.ndarray], statistic: Statistic, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Estimate a statistic of measurements.

    `cells`: one array [quantities, prompts, seeds] per concept, with the same quantities and seeds for every concept
    and its own prompts. `draws`: bootstrap samples of each kind, drawn with `seed`.
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
    """Bootstrap samples for measurements of one shape; they do not depend on the measured values."""

    seeds: np.ndarray  # [draws, seeds - 1]
    prompts: list[np.ndarray]  # per concept, the weight of every prompt, [draws, prompts]
    cells: list[np.ndarray]  # per concept, indices of its cells, [prompts, draws, seeds]


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


@dataclass(frozen=True)
class Resampled:
    """Means of several quantities over concepts, prompts and seeds: as measured, and in the bootstrap samples.

    The samples are those of `estimate`, so a difference of two functions of these means has the same variances as
    there; but all pairs of many defenses share one resampling.
    """

    value: np.ndarray  # [quantities]
    by_seeds: np.ndarray | None  # [draws, quantities]; None: fewer than two seeds
    by_prompts: np.ndarray | None  # None: a concept has fewer than two prompts
    by_cells: np.ndarray | None
    seeds: int
    prompts: int  # prompts beyond the first of each concept

    def estimate(self, statistic: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return the estimate of a function of the means: [draws, quantities] -> [draws]."""
        values, of_seeds, of_prompts = self.differences(lambda means: statistic(means)[:, None], [(0, None)])
        seeds = None if of_seeds is None else float(of_seeds[0])
        prompts = None if of_prompts is None else float(of_prompts[0])
        return Estimate(float(values[0]), seeds, prompts, self.seeds, self.prompts)

    def differences(
        self, statistic: Callable[[np.ndarray], np.ndarray], pairs: Sequence[tuple[int, int | None]]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return (values, variances from seeds, additional variances from prompts), one each for every pair.

        `statistic`: [draws, quantities] -> [draws, columns]. A pair names two columns, of which the second is
        subtracted from the first; None: nothing is subtracted.
        """
        if self.by_seeds is None:
            return _between(statistic(self.value[None]), pairs)[0], None, None
        made = [_between(statistic(means), pairs) for means in (self.value[None], self.by_seeds)]
        values, of_seeds = made[0][0], np.var(made[1], axis=0, ddof=1)
        if self.by_prompts is None:
            return values, of_seeds, None
        both, own = (
            np.var(_between(statistic(means), pairs), axis=0, ddof=1) for means in (self.by_prompts, self.by_cells)
        )
        return values, of_seeds, np.maximum(both - own, 0.0)

    def p_values(self, values: np.ndarray, of_seeds: np.ndarray | None, of_prompts: np.ndarray | None) -> np.ndarray:
        """Return `Estimate.p_value` of each difference; NaN for one seed."""
        if of_seeds is None:
            return np.full(len(values), np.nan)
        prompts = np.zeros_like(of_seeds) if of_prompts is None else of_prompts
        return _p_values(np.abs(values), (self.seeds - 1, of_seeds), (max(self.prompts, 1), prompts))


def resample(cells: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> Resampled:
    """Resample measurements once for all functions of their means; arguments as of `estimate`."""
    seeds, prompts = cells[0].shape[2], tuple(x.shape[1] for x in cells)
    beyond = sum(count - 1 for count in prompts)
    means = _averaged(cells)[0]  # [concepts, quantities, seeds]
    value = means.mean(axis=(0, 2))
    if seeds < 2:
        return Resampled(value, None, None, None, seeds, beyond)
    drawn = _drawn(seed, draws, seeds, prompts)
    over_concepts = means.mean(axis=0)
    by_seeds = _counts(drawn.seeds, seeds) @ over_concepts.T
    if min(prompts) < 2:
        return Resampled(value, by_seeds, None, None, seeds, beyond)
    by_prompts, by_cells = np.zeros((2, draws, len(value)))
    for x, weights, shares in zip(cells, drawn.prompts, _cell_shares(seed, draws, seeds, prompts), strict=True):
        by_prompts += weights @ x.mean(axis=2).T
        by_cells += x.mean(axis=(1, 2)) + shares @ _residuals(x).reshape(len(value), -1).T
    return Resampled(value, by_seeds, by_prompts / len(cells), by_cells / len(cells), seeds, beyond)


def _between(columns: np.ndarray, pairs: Sequence[tuple[int, int | None]]) -> np.ndarray:
    """Return the difference of each pair of columns, [draws, pairs]."""
    return np.stack([columns[:, a] - (0.0 if b is None else columns[:, b]) for a, b in pairs], axis=1)


def _counts(chosen: np.ndarray, of: int) -> np.ndarray:
    """Return how often each of `of` indices was chosen in every draw, as a share: [draws, of]."""
    draws, each = chosen.shape
    places = (np.arange(draws)[:, None] * of + chosen).ravel()
    return np.bincount(places, minlength=draws * of).reshape(draws, of) / each


@functools.lru_cache(maxsize=4)
def _cell_shares(seed: int, draws: int, seeds: int, prompts: tuple[int, ...]) -> list[np.ndarray]:
    """Return, per concept, how often each of its cells was drawn, as a share: [draws, prompts * seeds]."""
    drawn = _drawn(seed, draws, seeds, prompts).cells
    return [_counts(np.moveaxis(of, 1, 0).reshape(draws, -1), len(of) * seeds) for of in drawn]


def _averaged(cells: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([x.mean(axis=1) for x in cells])[None]


def _over_seeds(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    means = _averaged(cells)[0]  # [concepts, quantities, seeds]
    return float(np.var(statistic(np.moveaxis(means[:, :, drawn.seeds], 2, 0)), ddof=1))


def _over_prompts(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    means = [np.einsum("dp,qps->dqs", weights, x) for weights, x in zip(drawn.prompts, cells, strict=True)]
    return float(np.var(statistic(np.stack(means, axis=1)), ddof=1))


def _over_cells(cells: Sequence[np.ndarray], statistic: Statistic, drawn: _Drawn) -> float:
    """Return the variance when only the residuals of the cells, without seed and prompt effects, are drawn."""
    draws, (quantities, _, seeds) = len(drawn.seeds), cells[0].shape
    means = np.empty((draws, len(cells), quantities, seeds))
    for place, (x, chosen) in enumerate(zip(cells, drawn.cells, strict=True)):
        prompts, by_seed = x.shape[1], x.mean(axis=1, keepdims=True)
        flat = _residuals(x).reshape(quantities, prompts * seeds)
        noise = flat.take(chosen[0], axis=1)  # [quantities, draws, seeds]
        for places in chosen[1:]:  # one prompt at a time, to save memory
            noise += flat.take(places, axis=1)
        noise /= prompts
        np.add(by_seed[:, 0][None], np.moveaxis(noise, 1, 0), out=means[:, place])
    return float(np.var(statistic(means), ddof=1))


def _residuals(x: np.ndarray) -> np.ndarray:
    """Return what is left of [quantities, prompts, seeds] without seed and prompt effects, at its unbiased size."""
    prompts, seeds = x.shape[1:]
    by_seed, by_prompt = x.mean(axis=1, keepdims=True), x.mean(axis=2, keepdims=True)
    left = x - by_seed - by_prompt + x.mean(axis=(1, 2), keepdims=True)
    return left * math.sqrt(prompts * seeds / ((prompts - 1) * (seeds - 1)))


def _p_values(sizes: np.ndarray, *parts: tuple[int, np.ndarray]) -> np.ndarray:
    """Return the least p of each size at which limits of parts (degrees of freedom, variances) exclude zero."""
    from scipy.special import stdtrit

    total = sum(variances for _, variances in parts)
    low, high = np.full(len(sizes), -40.0), np.zeros(len(sizes))  # bounds of ln p
    for _ in range(60):
        middle = (low + high) / 2
        tails = np.exp(middle) / 2
        reach = np.sqrt(sum(stdtrit(degrees, tails) ** 2 * variances for degrees, variances in parts))
        is_inside = reach > sizes
        low, high = np.where(is_inside, middle, low), np.where(is_inside, high, middle)
    return np.where(total > 0.0, np.exp(high), np.where(sizes == 0.0, 1.0, 0.0))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's (1979) corrected p-values, which bound the chance that any test makes a false claim.

    None (not tested) stays None and does not count.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, index) in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * p))
        corrected[index] = greatest
    return corrected


def _quantile(degrees: float, probability: float) -> float:
    from scipy.special import stdtrit  # only this quantile: importing scipy.stats takes a second

    return float(stdtrit(degrees, probability))


def _normal(values: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return ndtr(values)


@functools.cache
def _spread(degrees: int, points: int = 64) -> np.ndarray:
    """Return evenly spaced quantiles of an estimated variance over the true one: chi-squared over its degrees."""
    from scipy.special import chdtri

    return chdtri(degrees, (np.arange(points) + 0.5) / points) / degrees
