"""Two defenses side by side: is one stronger than the other, and how sure is that? Pure arithmetic, no torch, no files.

    stronger_by    what the attack reaches on the baseline less what it reaches on the defense, in the metric's unit
                   (of a distance the other way round), mean over targets. Above 0: the defense protects more.
    low, high      its 95 % interval; `covers`: of which chance (`harness.analysis.statistics`). Paired by concept,
                   prompt and seed.
    p, p_corrected of no difference; corrected by Holm over the attacks and the worst case of a task, metric and step.
    detectable     the least difference that so many seeds and prompts find in four of five runs, at the level of the
                   first of the corrected tests.
    retained_by    the same on innocent concepts with the opposite sign. Above 0: they are learned better.
    verdict        stronger | weaker: p_corrected below 0.05; unclear: no significant difference; not tested: one seed.

Worst case: what the most successful attack on each of the two defenses reaches. The attack is chosen anew in every
bootstrap sample, so that its choice is part of the chance. Attacks that some target lacks are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.analysis.measurements import Cell, Measurements, measured
from harness.analysis.statistics import Estimate, estimate, holm

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "task", "metric", "step", "attack", "attacker", "defense", "baseline", "n_targets", "n_seeds", "n_prompts",
    "reached_defense", "reached_baseline", "reached_none", "stronger_by", "low", "high", "covers", "p", "p_corrected",
    "detectable", "n_innocents", "retained_by", "retained_low", "retained_high", "retained_p", "verdict", "unit",
)  # fmt: skip
WORST = "worst case"
LEVEL = 0.05

Key = tuple[str, str, str, str, int]
"""(task, attack, attacker, metric, step)."""
Sides = tuple[Sequence[str], Sequence[str]]
"""Names of the defenses of each side."""
Compared = tuple[dict[str, Any], Estimate]
"""A line, and the estimate of its `stronger_by`."""


def compare(
    rows: DataFrame | Measurements, defense: str, baselines: Sequence[str], draws: int = 1000
) -> list[dict[str, Any]]:
    """Return a line for each baseline, task, metric, step and attack, and the worst case over attacks.

    Tasks that lack one of the two are left out. Raises ValueError, naming what there is, for an unknown defense.
    """
    table = measured(rows)
    known = list(dict.fromkeys(name for of in table.defenses.values() for name in of))
    for name in (defense, *baselines):
        if name not in known:
            raise ValueError(f"no defense '{name}' among these rows; there are {', '.join(known) or 'none'}")
    lines = []
    for baseline in baselines:
        families: dict[tuple[str, str, int], list[Key]] = {}
        for key in table.groups:
            task, _, _, metric, step = key
            if defense in table.defenses[task] and baseline in table.defenses[task]:
                families.setdefault((task, metric, step), []).append(key)
        for keys in families.values():
            lines += _family(table, keys, defense, baseline, draws)
    return lines


def _family(table: Measurements, keys: Sequence[Key], defense: str, baseline: str, draws: int) -> list[dict[str, Any]]:
    """Return the lines of the attacks of one task, metric and step, and their worst case, corrected together."""
    sides = ((defense,), (baseline,))
    compared = [found for key in keys if (found := compare_sides(table, [key], sides, draws))]
    if len(compared) > 1 and (worst := compare_sides(table, keys, sides, draws)):
        compared.append(worst)
    return judge(compared)


def judge(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return the lines of tests that are corrected together, with p_corrected, detectable and verdict."""
    tests = sum(line["p"] is not None for line, _ in compared)
    for (line, found), corrected in zip(compared, holm([line["p"] for line, _ in compared]), strict=True):
        line["p_corrected"] = corrected
        line["detectable"] = found.detectable(level=1 - LEVEL / max(tests, 1))  # as the first of Holm's steps asks
        line["verdict"] = _verdict(line)
    return [line for line, _ in compared]


def compare_sides(table: Measurements, keys: Sequence[Key], sides: Sides, draws: int = 1000) -> Compared | None:
    """Return the line of an attack, or of the worst case of several; None where the sides share no target.

    A side of several defenses counts with their mean. What depends on the other tests is left to `judge`.
    """
    task, attack, attacker, metric, step = keys[0]
    sign = table.sign(metric)
    statistic = gap_of_greatest(len(keys), sign)
    cells, seeds = paired_cells(table, keys, sides, "target")
    if not cells:
        return None
    found = estimate(cells, statistic, draws=draws)
    # innocents are compared attack by attack: they have no worst case
    innocents, _ = paired_cells(table, keys, sides, "innocent") if len(keys) == 1 else ([], 0)
    kept = estimate(innocents, statistic, draws=draws) if innocents else None
    reached = [closest(cells, side, len(keys), sign) for side in (0, 1)]
    none = table.undefended[task]
    beside, _ = paired_cells(table, keys, (*sides, (none,)), "target") if none else ([], 0)
    low, high = found.interval()
    line = {
        "task": task,
        "metric": metric,
        "step": step,
        "attack": attack if len(keys) == 1 else WORST,
        "attacker": attacker if len(keys) == 1 else "",
        "defense": " + ".join(sides[0]),
        "baseline": " + ".join(sides[1]),
        "n_targets": len(cells),
        "n_seeds": seeds,
        "n_prompts": sum(x.shape[1] for x in cells),
        "reached_defense": reached[0],
        "reached_baseline": reached[1],
        "reached_none": closest(beside, 2, len(keys), sign) if beside else None,
        "stronger_by": found.value,
        "low": low,
        "high": high,
        "covers": found.covers,
        "p": found.p_value(),
        "p_corrected": None,
        "detectable": None,
        "n_innocents": len(innocents),
        **_retained(kept),
        "verdict": "",
        "unit": table.about[metric]["unit"],
    }
    return line, found


def _retained(found: Estimate | None) -> dict[str, float | None]:
    """Return the columns of innocents: the same gap with the opposite sign."""
    names = ("retained_by", "retained_low", "retained_high", "retained_p")
    if found is None:
        return dict.fromkeys(names)
    low, high = found.interval()
    turned = (None, None) if low is None else (-high, -low)
    return dict(zip(names, (-found.value, *turned, found.p_value()), strict=True))


def _verdict(line: Mapping[str, Any]) -> str:
    if line["p_corrected"] is None:
        return "not tested"
    if line["p_corrected"] >= LEVEL:
        return "unclear"
    return "stronger" if line["stronger_by"] > 0 else "weaker"


def paired_cells(
    table: Measurements, keys: Sequence[Key], sides: Sequence[Sequence[str]], role: str
) -> tuple[list[np.ndarray], int]:
    """Return ([sides x attacks, prompts, seeds] of each concept, number of seeds): a side's attacks, then the next's.

    Concepts and seeds that were measured throughout: in every attack, on all sides, with the same number of prompts.
    Of an unfinished run that is the choice of seeds that leaves most of it. Of several defenses of a side the mean.
    """
    found = [
        table.values(task, defense, attack, attacker, metric, step, role)
        for side in sides
        for defense in side
        for task, attack, attacker, metric, step in keys
    ]
    ends = np.cumsum([len(side) for side in sides])[:-1]
    if not all(found):
        return [], 0
    shared = set.intersection(*(set(values) for values in found))
    by_cell: dict[Cell, set[int]] = {}
    for protected, concept, seed in shared:
        by_cell.setdefault((protected, concept), set()).add(seed)
    order = [cell for cell in dict.fromkeys(trial[:2] for trial in found[0]) if cell in by_cell]
    if not order:
        return [], 0
    seeds = _seeds_kept(list(by_cell.values()))
    arrays = []
    for cell in order:
        listed = [[values[(*cell, seed)] for seed in seeds] for values in found if set(seeds) <= by_cell[cell]]
        lengths = {len(values) for of in listed for values in of}
        if listed and len(lengths) == 1:
            values = np.asarray(listed, dtype=float).swapaxes(1, 2)
            by_defense = values.reshape(-1, len(keys), *values.shape[1:])
            arrays.append(np.concatenate([of_side.mean(axis=0) for of_side in np.split(by_defense, ends)]))
    return arrays, len(seeds)


def _seeds_kept(by_concept: Sequence[set[int]]) -> list[int]:
    """Return the seeds whose rectangle of concepts that have them all is largest; of equal ones that of most seeds."""
    choices: set[frozenset[int]] = set()  # every intersection of what concepts have
    for own in {frozenset(own) for own in by_concept}:
        choices |= {own} | {own & other for other in choices}

    def kept(seeds: frozenset[int]) -> tuple:
        return len(seeds) * sum(seeds <= own for own in by_concept), len(seeds), sorted(seeds)

    return sorted(max(choices, key=kept))


def gap_of_greatest(attacks: int, sign: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the statistic: what the closest attack reaches on the baseline less that on the defense."""

    def gap(means: np.ndarray) -> np.ndarray:
        of_attack = sign * means.mean(axis=(1, 3))  # [draws, 2 x attacks]
        return of_attack[:, attacks:].max(axis=1) - of_attack[:, :attacks].max(axis=1)

    return gap


def closest(cells: Sequence[np.ndarray], side: int, attacks: int, sign: int) -> float:
    """Return what the closest attack reaches on one side, mean over concepts, prompts and seeds."""
    means = np.mean([x.mean(axis=(1, 2)) for x in cells], axis=0)
    return max((float(value) for value in means[side * attacks : (side + 1) * attacks]), key=lambda v: sign * v)
