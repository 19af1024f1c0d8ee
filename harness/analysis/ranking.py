"""Tests of pairs of defenses within a task, metric and step: each is done once, however often it is asked for.

Ranks are asked for at several utility floors, and a floor only changes which defenses and attacks count. Defenses that
count are complete, so the test of two of them does not depend on which others count beside them: all pairs of a
quantity are tested in one go, and Holm's correction is done for those that are asked for together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from harness.analysis.measurements import Measurements
from harness.analysis.pairing import Key, paired_cells
from harness.analysis.statistics import Resampled, resample

LEVEL = 0.05
Attack = tuple[str, str]
"""(attack, attacker)."""


@dataclass
class Block:
    """Defenses that are ranked among each other by one quantity, of which more is better, and the tests of all pairs.

    `names` is empty where nothing can be tested.
    """

    names: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    better: set[tuple[str, str]] = field(default_factory=set)
    """(defense, another one that it is significantly better than)."""

    def decide(self, corrected: Sequence[float]) -> None:
        """Set what is significantly better, from the corrected p of each pair."""
        for (one, other), difference, p in zip(combinations(self.names, 2), self.differences, corrected, strict=True):
            if p < LEVEL:
                self.better.add((one, other) if difference > 0 else (other, one))

    def ranks(self, name: str) -> tuple[int | None, int | None]:
        """Return the least and the greatest rank of a defense that chance leaves possible."""
        if name not in self.names:
            return None, None
        above = sum((other, name) in self.better for other in self.names)
        below = sum((name, other) in self.better for other in self.names)
        return 1 + above, len(self.names) - below


@dataclass(frozen=True)
class _Tested:
    """All pairs of some defenses: [defense, another one]."""

    places: dict[str, int]
    differences: np.ndarray
    p: np.ndarray


class PairTests:
    """The tests of one task, metric and step."""

    def __init__(self, table: Measurements, about: tuple[str, str, int], draws: int):
        self.table, self.about, self.draws = table, about, draws
        self.none = table.undefended[about[0]]
        self._tested: dict[tuple[tuple[Attack, ...], str], _Tested | None] = {}
        self._whole: dict[tuple[Attack, ...], tuple[list[str], Resampled | None]] = {}
        self._intervals: dict[tuple, tuple[float, float | None, float | None]] = {}

    @property
    def sign(self) -> int:
        """1 where a greater value of the metric is closer to the concept, else -1."""
        return self.table.sign(self.about[1])

    def keys(self, attacks: Sequence[Attack]) -> list[Key]:
        """Return the keys of attacks in the table."""
        task, metric, step = self.about
        return [(task, attack, attacker, metric, step) for attack, attacker in attacks]

    def of_targets(self, attacks: Sequence[Attack], names: list[str]) -> Block:
        """Return the tests by how far the closest of the attacks stays away; without a second seed, an empty block."""
        return self._block(attacks, names, "target", lambda of: -of.max(axis=2))

    def of_innocents(self, attacks: Sequence[Attack], names: list[str]) -> Block:
        """Return the tests by how well innocents are learned, mean over attacks."""
        return self._block(attacks, names, "innocent", lambda of: of.mean(axis=2))

    def _block(
        self, attacks: Sequence[Attack], names: list[str], role: str, quantity: Callable[[np.ndarray], np.ndarray]
    ) -> Block:
        """Return the tests of all pairs, not yet corrected; `quantity`: [draws, defenses, attacks] of closeness."""
        if len(names) < 2 or not attacks:
            return Block()
        asked = tuple(attacks), role
        found = self._tested.get(asked)
        if asked not in self._tested or (found is not None and not found.places.keys() >= set(names)):
            known = list(found.places) if found is not None else []
            found = self._tested[asked] = self._test(*asked, list(dict.fromkeys([*known, *names])), quantity)
        if found is None:
            return Block()
        chosen = [found.places[name] for name in names]
        pairs = tuple(np.array(list(combinations(chosen, 2))).T)
        return Block(names, found.differences[pairs].tolist(), found.p[pairs].tolist())

    def _test(
        self, attacks: tuple[Attack, ...], role: str, names: list[str], quantity: Callable[[np.ndarray], np.ndarray]
    ) -> _Tested | None:
        cells, seeds = paired_cells(self.table, self.keys(attacks), [(name,) for name in names], role)
        if not cells or seeds < 2:
            return None
        found, sign = resample(cells, draws=self.draws), self.sign
        values, *variances = found.differences(
            lambda means: quantity((sign * means).reshape(len(means), -1, len(attacks))),
            list(combinations(range(len(names)), 2)),
        )
        differences, p = np.zeros((2, len(names), len(names)))
        upper = np.triu_indices(len(names), 1)
        differences[upper], p[upper] = values, found.p_values(values, *variances)
        return _Tested({name: i for i, name in enumerate(names)}, differences - differences.T, p + p.T)

    # -- the worst case ------------------------------------------------------------------------------------------

    def sgr(
        self, attacks: Sequence[Attack], name: str, chosen: Sequence[int], of_none: Sequence[int]
    ) -> tuple[float, float | None, float | None] | None:
        """Return (SGR of a defense in the worst case, its interval); None where a trial is missing.

        `chosen`, `of_none`: the places of the attacks that the closest is chosen from, on the defense and on the
        undefended model.
        """
        asked = tuple(attacks), name, tuple(chosen), tuple(of_none)
        if asked in self._intervals:
            return self._intervals[asked]
        names, found = self._complete(tuple(attacks))
        if found is None or name not in names:
            return None
        place, sign = names.index(name), self.sign

        def gap(means: np.ndarray) -> np.ndarray:
            of = (sign * means).reshape(len(means), len(names), len(attacks))
            bare, defended = of[:, 0, of_none].max(axis=1), of[:, place, chosen].max(axis=1)
            return (bare - defended) / (sign * bare)

        estimate = found.estimate(gap)
        self._intervals[asked] = estimate.value, *estimate.interval()
        return self._intervals[asked]

    def _complete(self, attacks: tuple[Attack, ...]) -> tuple[list[str], Resampled | None]:
        """Return the undefended model and the defenses with all of its trials, and their resampled means."""
        if attacks not in self._whole:
            task = self.about[0]
            others = [name for name in self.table.defenses[task] if name != self.none]
            names = [self.none, *(name for name in others if self._has_all(attacks, name))]
            cells, seeds = paired_cells(self.table, self.keys(attacks), [(name,) for name in names], "target")
            found = resample(cells, draws=self.draws) if cells and seeds >= 2 else None
            self._whole[attacks] = names, found
        return self._whole[attacks]

    def _has_all(self, attacks: Sequence[Attack], name: str) -> bool:
        return all(
            self.table.means(key[0], self.none, *key[1:], "target").keys()
            <= self.table.means(key[0], name, *key[1:], "target").keys()
            for key in self.keys(attacks)
        )
