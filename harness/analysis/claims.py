"""What may be claimed of the leaderboard's lines: ranks, the worst case's interval, and the Pareto front. No files.

The order of the lines alone is no claim: chance explains part of it. Within a task, metric and step every pair of
defenses whose lines are valid is tested, as `harness.analysis.compare` does it: under each attack, in the worst case
over attacks, and on innocents (mean over the attacks that count there). Holm's correction is over all of these tests.

    rank_low, rank_high  1 + the number of defenses that are significantly stronger, and the number of defenses less
                         those that are significantly weaker: the ranks that chance leaves possible, all pairs together
                         (Mogstad, Romano, Shaikh and Wilhelm 2024). Two defenses with ranks in common are tied.
                         Empty for one seed, for lines that are not valid, and where there is nothing to rank against.
    place                on the front: significantly better than each other defense, in immunity or in retention;
                         dominated: another one is significantly better in both; tie: neither can be claimed.

A worst case is of the attacks that count on a defense, and defenses are ranked by it where the same attacks count. The
interval of its SGR (`interval_over_seeds_and_prompts`) covers the choice of the closest attacks on both models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from harness.analysis.leaderboard import interval, worst_case
from harness.analysis.measurements import Measurements
from harness.analysis.pairing import Key, paired_cells
from harness.analysis.statistics import holm, resample

Line = Mapping[str, Any]
LEVEL = 0.05
DRAWS = 1000
FRONT, DOMINATED, TIE, ONE_SEED = "front", "dominated", "tie", "one seed"
"""The places of a defense in immunity and retention; "" where there is nothing to compare with."""


@dataclass(frozen=True)
class Standing:
    """A defense in a headline: its closest attack, what innocents keep, and its place."""

    line: Line
    """The line of the attack that comes closest; see `worst_case`."""
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    place: str = ""


@dataclass(frozen=True)
class Headline:
    """The result of a task by one metric: every defense at one step, which is named with the reason."""

    task: str
    metric: str
    step: int
    why: str
    """Why this step is shown, in words that follow the number."""
    lines: list[Line]
    """All lines of the step, those of single attacks."""
    standings: list[Standing]
    """Best protection first; lines that count before others."""


@dataclass(frozen=True)
class Claims:
    """The leaderboard and the worst case with ranks, and a headline for each task and metric."""

    lines: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    headlines: list[Headline]


def claims(table: Measurements, lines: Sequence[Line], draws: int = DRAWS) -> Claims:
    """Return the lines of `leaderboard` with their ranks, the worst case, and the headlines."""
    groups: dict[tuple[str, str, int], _Group] = {}
    for line in lines:
        group = groups.setdefault(_about(line), _Group(table, draws))
        group.lines.append(dict(line))
    for line in worst_case(lines):
        groups[_about(line)].worst.append(line)
    for group in groups.values():
        group.judge()
    ranked = {name: iter(group.lines) for name, group in groups.items()}
    headlines = []
    for task, metric in dict.fromkeys(name[:2] for name in groups):
        step, why = shown_step([line for line in lines if (line["task"], line["metric"]) == (task, metric)])
        if step is not None:
            group = groups[task, metric, step]
            headlines.append(Headline(task, metric, step, why, group.lines, group.standings()))
    worst = [line for group in groups.values() for line in group.worst]
    return Claims([next(ranked[_about(line)]) for line in lines], worst, headlines)


def shown_step(lines: Sequence[Line]) -> tuple[int | None, str]:
    """Return the step of a headline, and why: the last one of those at which most attacks were read.

    A worst case over attacks is of the attacks that were read at its step. (None, "") without lines.
    """
    read: dict[int, dict[str, None]] = {}
    for line in lines:
        if not line["is_weak"]:
            read.setdefault(line["step"], {})[line["attack"]] = None
    if not read:
        return None, ""
    attacks = list(dict.fromkeys(name for names in read.values() for name in names))
    most = max(map(len, read.values()))
    step = max(step for step, names in read.items() if len(names) == most)
    if len(attacks) == 1:
        return step, f"the last step of {attacks[0]}, the only attack"
    if most == len(attacks):
        later = [name for name in attacks if any(name in names for at, names in read.items() if at > step)]
        beyond = f"; {', '.join(later)} went on to step {max(read)}" if later else ""
        return step, f"the last step at which all {most} attacks were read{beyond}"
    missing = [name for name in attacks if name not in read[step]]
    if most == 1:
        return step, f"the last step of {next(iter(read[step]))}; attacks share no step, left out: {', '.join(missing)}"
    return step, (
        f"the last step at which as many as {most} of {len(attacks)} attacks were read; "
        f"not read there, and left out: {', '.join(missing)}"
    )


def _about(line: Line) -> tuple[str, str, int]:
    return line["task"], line["metric"], line["step"]


@dataclass
class _Block:
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


class _Group:
    """The lines of one task, metric and step, and their jointly corrected tests."""

    def __init__(self, table: Measurements, draws: int):
        self.table, self.draws = table, draws
        self.lines: list[dict[str, Any]] = []
        self.worst: list[dict[str, Any]] = []
        self.retained = _Block()
        self.by_attack: dict[tuple[str, str], _Block] = {}
        self.in_worst = _Block()

    def judge(self) -> None:
        """Do all tests, and put ranks and intervals into the lines."""
        strong = [line for line in self.lines if not line["is_weak"]]
        self.attacks = list(dict.fromkeys(_attack(line) for line in strong))
        for attack in self.attacks:
            valid = [line["defense"] for line in strong if _attack(line) == attack and line["valid"]]
            self.by_attack[attack] = self._tested([attack], valid, "target", self._immunity(1))
        if self.worst:
            attacks, names = _alike(strong, "valid")
            self.in_worst = self._tested(attacks, names, "target", self._immunity(len(attacks)))
        attacks, names = _alike(strong, "innocent_valid")
        self.retained = self._tested(attacks, names, "innocent", self._kept(len(attacks)))
        blocks = [*self.by_attack.values(), self.in_worst, self.retained]
        corrected = iter(holm([p for block in blocks for p in block.p]))
        for block in blocks:
            block.decide([next(corrected) for _ in block.p])
        for line in strong:
            line["rank_low"], line["rank_high"] = self.by_attack[_attack(line)].ranks(line["defense"])
        for line in self.worst:
            line["rank_low"], line["rank_high"] = self.in_worst.ranks(line["defense"])
        self._worst_intervals(strong)

    def standings(self) -> list[Standing]:
        """Return the place of every defense that was not made weak on purpose."""
        of_closest = self.worst or [line for line in self.lines if not line["is_weak"]]
        immunity = self.in_worst if self.worst else next(iter(self.by_attack.values()), _Block())
        return [
            Standing(line, *self._retention(line["defense"]), self._place(line, immunity)) for line in of_closest
        ]

    def _place(self, line: Line, immunity: _Block) -> str:
        name, retained = line["defense"], self.retained
        rivals = [other for other in immunity.names if other in retained.names and other != name]
        if line["n_seeds"] < 2:
            return ONE_SEED if line["valid"] else ""
        if not rivals or name not in immunity.names or name not in retained.names:
            return ""
        better = [
            ((name, other) in immunity.better or (name, other) in retained.better) for other in rivals
        ]  # fmt: skip
        if all(better):
            return FRONT
        is_dominated = any((other, name) in immunity.better & retained.better for other in rivals)
        return DOMINATED if is_dominated else TIE

    def _keys(self, attacks: Sequence[tuple[str, str]]) -> list[Key]:
        task, metric, step = _about(self.lines[0])
        return [(task, attack, attacker, metric, step) for attack, attacker in attacks]

    @property
    def _sign(self) -> int:
        return self.table.sign(self.lines[0]["metric"])

    def _immunity(self, attacks: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function of means: how far the closest attack stays away from each defense."""
        sign = self._sign
        return lambda means: -(sign * means).reshape(len(means), -1, attacks).max(axis=2)

    def _kept(self, attacks: int) -> Callable[[np.ndarray], np.ndarray]:
        """Return the function of means: how well innocents are learned, mean over attacks."""
        sign = self._sign
        return lambda means: (sign * means).reshape(len(means), -1, attacks).mean(axis=2)

    def _tested(self, attacks: Sequence[tuple[str, str]], names: list[str], role: str, statistic) -> _Block:
        """Return the tests of all pairs of defenses, not yet corrected; without a second seed or defense none."""
        if len(names) < 2 or not attacks:
            return _Block()
        cells, seeds = paired_cells(self.table, self._keys(attacks), [(name,) for name in names], role)
        if not cells or seeds < 2:
            return _Block()
        found = resample(cells, draws=self.draws)
        values, *variances = found.differences(statistic, list(combinations(range(len(names)), 2)))
        return _Block(names, values.tolist(), found.p_values(values, *variances).tolist())

    def _worst_intervals(self, strong: Sequence[Line]) -> None:
        """Put the intervals of SGR into the lines of the worst case, where every trial is there."""
        none = self.table.undefended[self.lines[0]["task"]]
        keys = self._keys(self.attacks)
        whole = [line for line in self.worst if line["defense"] != none and self._is_whole(keys, line["defense"], none)]
        if not whole or none is None:
            return
        names = [none, *(line["defense"] for line in whole)]
        cells, seeds = paired_cells(self.table, keys, [(name,) for name in names], "target")
        if not cells or seeds < 2:
            return
        found, sign = resample(cells, draws=self.draws), self._sign
        chosen = [self._chosen_from(strong, name) for name in names]

        def gap(means: np.ndarray, place: int) -> np.ndarray:
            of = (sign * means).reshape(len(means), len(names), len(keys))
            bare, defended = (of[:, at, chosen[at]].max(axis=1) for at in (0, place))
            return (bare - defended) / (sign * bare)

        for place, line in enumerate(whole, start=1):
            estimate = found.estimate(lambda means, place=place: gap(means, place))
            # the line is of all trials; resampling of those that all attacks share
            if line["sgr"] is not None and abs(estimate.value - line["sgr"]) < 1e-9:
                line["sgr_low"], line["sgr_high"] = estimate.interval()

    def _is_whole(self, keys: Sequence[Key], name: str, none: str | None) -> bool:
        return all(
            self.table.means(key[0], none, *key[1:], "target").keys()
            <= self.table.means(key[0], name, *key[1:], "target").keys()
            for key in keys
        )

    def _chosen_from(self, strong: Sequence[Line], name: str) -> list[int]:
        """Return the places of the attacks that the worst case of a defense is chosen from; see `worst_case`."""
        own = [line for line in strong if line["defense"] == name]
        of = [line for line in own if line["valid"]] or own
        return [self.attacks.index(_attack(line)) for line in of]

    def _retention(self, name: str) -> tuple[float | None, float | None, float | None]:
        """Return what innocents keep, mean over the attacks that count on them, with its interval over seeds."""
        kept = [
            line for line in self.lines
            if line["defense"] == name and line["innocent_valid"] and line["innocent_sgr"] is not None
        ]  # fmt: skip
        if not kept:
            return None, None, None
        by_seed: dict[int, list[float]] = {}
        for key in self._keys([_attack(line) for line in kept]):
            for seed, values in self._shares(key, name).items():
                by_seed.setdefault(seed, []).append(sum(values) / len(values))
        whole = [sum(values) / len(values) for values in by_seed.values() if len(values) == len(kept)]
        return (sum(1 - line["innocent_sgr"] for line in kept) / len(kept), *interval(whole))

    def _shares(self, key: Key, name: str) -> dict[int, list[float]]:
        """Return seed -> share that each innocent keeps under one attack."""
        none = self.table.means(key[0], self.table.undefended[key[0]], *key[1:], "innocent")
        own = self.table.means(key[0], name, *key[1:], "innocent")
        shares: dict[int, list[float]] = {}
        for trial, bare in none.items():
            if trial in own:
                shares.setdefault(trial[2], []).append(1 - self._sign * (bare - own[trial]) / bare)
        return shares


def _attack(line: Line) -> tuple[str, str]:
    return line["attack"], line["attacker"]


def _alike(lines: Sequence[Line], counts: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the attacks that count on any defense, and the defenses on which all of them do."""
    found: dict[str, dict[tuple[str, str], None]] = {}
    for line in lines:
        if line[counts]:
            found.setdefault(line["defense"], {})[_attack(line)] = None
    attacks = list(dict.fromkeys(attack for own in found.values() for attack in own))
    return attacks, [name for name, own in found.items() if len(own) == len(attacks)]
