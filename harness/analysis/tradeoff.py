"""Two quantities against each other over several settings: which are on the front, and curves read at one level. Pure.

One quantity is to be low (similarity to a training image), the other high (alignment with the prompt). All pairs of
settings are tested in both, paired by prompt and seed, and corrected together by Holm's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from harness.analysis.statistics import Estimate, Resampled, holm

LEVEL = 0.05
FRONT, DOMINATED, TIE, ONE_SEED = "front", "dominated", "tie", "one seed"


def places(names: Sequence[str], low: Resampled, high: Resampled) -> dict[str, str]:
    """Return name -> its place; `low` and `high` have a mean for each name, in order.

    front: significantly better than each other one in at least one quantity; dominated: another is significantly better
    in both; tie: chance explains the difference to some other; one seed: nothing can be tested.
    """
    if low.by_seeds is None:
        return dict.fromkeys(names, ONE_SEED)
    pairs = list(combinations(range(len(names)), 2))
    if not pairs:
        return dict.fromkeys(names, FRONT)
    better: list[set[tuple[int, int]]] = []
    tested = []
    for of, sign in ((low, -1.0), (high, 1.0)):
        found = of.differences(lambda means, sign=sign: sign * means, pairs)
        tested.append((found[0], of.p_values(*found)))
    corrected = holm([float(p) for _, p_values in tested for p in p_values])
    for index, (values, _) in enumerate(tested):
        own = corrected[index * len(pairs) : (index + 1) * len(pairs)]
        better.append(
            {pair if value > 0 else pair[::-1] for pair, value, p in zip(pairs, values, own, strict=True) if p < LEVEL}
        )
    made = {}
    for place, name in enumerate(names):
        others = [other for other in range(len(names)) if other != place]
        if all((place, other) in better[0] | better[1] for other in others):
            made[name] = FRONT
        elif any((other, place) in better[0] & better[1] for other in others):
            made[name] = DOMINATED
        else:
            made[name] = TIE
    return made


def front_of_means(names: Sequence[str], low: Sequence[float], high: Sequence[float]) -> set[str]:
    """Return the names that no other one beats in one mean without being worse in the other; chance is left out."""
    pairs = list(zip(names, low, high, strict=True))
    return {
        name for name, x, y in pairs
        if not any((a <= x and b >= y) and (a < x or b > y) for other, a, b in pairs if other != name)
    }  # fmt: skip


def at_level(
    curves: Mapping[str, Sequence[int]], low: Resampled, high: Resampled, level: float
) -> dict[str, Estimate | None]:
    """Return, for each curve, the high quantity where the low one is `level`, linear between neighbouring settings.

    None: the curve does not reach that level.

    `curves`: name -> indices of the settings on it. A bootstrap sample in which the curve does not reach the level
    takes its nearest end. The level is taken as given: if it was measured, its own chance is not in the interval.
    """
    both = Resampled(
        np.concatenate([low.value, high.value]),
        *(
            None if a is None or b is None else np.concatenate([a, b], axis=1)
            for a, b in zip(
                (low.by_seeds, low.by_prompts, low.by_cells), (high.by_seeds, high.by_prompts, high.by_cells),
                strict=True,
            )
        ),
        low.seeds, low.prompts,
    )  # fmt: skip
    size = len(low.value)
    found: dict[str, Estimate | None] = {}
    for name, places in curves.items():
        own = list(places)
        reached = low.value[own]
        if not reached.min() <= level <= reached.max():
            found[name] = None
            continue

        def read(means: np.ndarray, own: list[int] = own) -> np.ndarray:
            lows, highs = means[:, own], means[:, [size + place for place in own]]
            order = np.argsort(lows, axis=1)
            lows, highs = np.take_along_axis(lows, order, 1), np.take_along_axis(highs, order, 1)
            return np.array([np.interp(level, x, y) for x, y in zip(lows, highs, strict=True)])

        found[name] = both.estimate(read)
    return found


def beside(
    both: Resampled, curve: Sequence[int], place: int, *, less_is_better: bool, less_is_wanted: bool
) -> Estimate | None:
    """Return a setting's result less the best that a curve reaches at the setting's quality or a better one.

    The curve's result at a quality is linear between neighbouring settings, and never worse than at a better quality:
    a setting that is beaten in both does not count. None: the setting's quality is worse than any on the curve. If it
    is better than any, it is compared with the curve's best end; so is each bootstrap sample beyond an end.

    `both`: the means of all settings' quality, then, in the same order, of their result. `curve`: indices of its
    settings; `place`: that of the setting. `less_is_better`: of the quality; `less_is_wanted`: of the result. Unlike
    `at_level` the level is measured, and its chance is in the interval. The best of several noisy settings looks a
    little better than it is, which favours the curve.
    """
    size, own = len(both.value) // 2, list(curve)
    quality, result = (1.0 if less_is_better else -1.0), (1.0 if less_is_wanted else -1.0)
    if quality * both.value[place] > (quality * both.value[own]).max():
        return None

    def apart(means: np.ndarray) -> np.ndarray:
        level, reached = quality * means[:, place], result * means[:, size + place]
        first, second = quality * means[:, own], result * means[:, [size + index for index in own]]
        order = np.argsort(first, axis=1)
        first, second = np.take_along_axis(first, order, 1), np.take_along_axis(second, order, 1)
        best = np.minimum.accumulate(second, axis=1)
        at = np.array([np.interp(*each) for each in zip(level, first, best, strict=True)])
        return result * (reached - at)

    return both.estimate(apart)
