"""Two defenses side by side: is one stronger than the other, and how sure is that? Pure arithmetic, no torch, no files.

    stronger_by    the attack's score on the baseline minus its score on the defense, in the metric's unit (reversed for
                   a distance), mean over targets. Above 0: the defense protects more.
    low, high      its 95 % interval, paired by concept, prompt and seed; `covers` names the kinds of chance that it
                   includes (`harness.analysis.statistics`).
    p, p_corrected for no difference; Holm's correction is over attacks and worst case of a task, metric and step.
    detectable     the least difference that this number of seeds and prompts finds in four of five runs, at the level
                   of the first step of Holm's correction.
    retained_by    the same on innocent concepts with reversed sign; above 0: they are learned better.
    verdict        stronger | weaker: p_corrected below 0.05; unclear: no significant difference; not tested: one seed.
    valid_*        whether the leaderboard's line of each side counts. A verdict is about the difference alone; it is no
                   result where a side does not count. `reason_*` says why.
    utility_*      what is left of each side's utility.

Worst case: the score of the most successful attack on each of the two, which may be different attacks. They are chosen
again in every bootstrap sample, so that the interval covers this choice. It is of the attacks that count on both sides,
as in the leaderboard; where none does, of all. An attack that some target lacks is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.analysis.leaderboard import Gates, line_of
from harness.analysis.measurements import Measurements, measured
from harness.analysis.pairing import Key, paired_cells
from harness.analysis.reached import of_targets
from harness.analysis.statistics import Estimate, estimate, holm

if TYPE_CHECKING:
    from pandas import DataFrame

TEST_COLUMNS = (
    "task", "metric", "step", "attack", "attacker", "defense", "baseline", "n_targets", "n_seeds", "n_prompts",
    "reached_defense", "reached_baseline", "reached_none", "stronger_by", "low", "high", "covers", "p", "p_corrected",
    "detectable", "n_innocents", "retained_by", "retained_low", "retained_high", "retained_p", "verdict", "unit",
)  # fmt: skip
"""Columns of a test."""
COLUMNS = (
    *TEST_COLUMNS, "valid_defense", "utility_defense", "reason_defense", "valid_baseline", "utility_baseline",
    "reason_baseline",
)  # fmt: skip
WORST = "worst case"
LEVEL = 0.05

Sides = tuple[Sequence[str], Sequence[str]]
"""Names of the defenses of each side."""
Compared = tuple[dict[str, Any], Estimate]
"""A line, and the estimate of its `stronger_by`."""


def compare(
    rows: DataFrame | Measurements,
    defense: str,
    baselines: Sequence[str],
    draws: int = 1000,
    gates: Gates | None = None,
) -> list[dict[str, Any]]:
    """Return a line for each baseline, task, metric, step and attack, and the worst case over attacks.

    `gates`: the suite's; None: the usual ones. Tasks that lack one of the two are left out. Raises ValueError for an
    unknown defense and names the known ones.
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
            lines += _family(table, keys, defense, baseline, draws, gates or Gates())
    return lines


def _family(
    table: Measurements, keys: Sequence[Key], defense: str, baseline: str, draws: int, gates: Gates
) -> list[dict[str, Any]]:
    """Return the lines of the attacks of one task, metric and step, and their worst case, corrected together."""
    sides = ((defense,), (baseline,))
    own = {key: [line_of(table, key, side, gates) for side in (defense, baseline)] for key in keys}
    compared, counting = [], []
    for key in keys:
        if found := compare_sides(table, [key], sides, draws):
            compared.append((found[0] | _counted([own[key]]), found[1]))
            counting.append(key)
    if len(compared) > 1:
        chosen = [key for key in counting if all(line and line["valid"] for line in own[key])]
        if found := compare_sides(table, chosen or keys, sides, draws, is_worst=True):
            compared.append((found[0] | _counted([own[key] for key in chosen or keys]), found[1]))
    return judge(compared)


def _counted(own: Sequence[Sequence[Mapping[str, Any] | None]]) -> dict[str, Any]:
    """Return the columns on whether both sides count, from the leaderboard's lines of both under each attack."""
    found: dict[str, Any] = {}
    for side, lines in zip(("defense", "baseline"), zip(*own, strict=True), strict=True):
        missing = "not measured against an undefended model"
        reasons = [missing if line is None else of_targets(line["reason"]) for line in lines]
        found[f"valid_{side}"] = all(line is not None and line["valid"] for line in lines)
        found[f"utility_{side}"] = next((line["utility"] for line in lines if line is not None), None)
        found[f"reason_{side}"] = "; ".join(dict.fromkeys(filter(None, reasons)))
    return found


def judge(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return the lines of jointly corrected tests, with p_corrected, detectable and verdict."""
    tests = sum(line["p"] is not None for line, _ in compared)
    for (line, found), corrected in zip(compared, holm([line["p"] for line, _ in compared]), strict=True):
        line["p_corrected"] = corrected
        line["detectable"] = found.detectable(level=1 - LEVEL / max(tests, 1))  # the level of Holm's first step
        line["verdict"] = _verdict(line)
    return [line for line, _ in compared]


def compare_sides(
    table: Measurements, keys: Sequence[Key], sides: Sides, draws: int = 1000, is_worst: bool | None = None
) -> Compared | None:
    """Return the line of an attack, or of the worst case of several; None where the sides share no target.

    `is_worst`: whether it is a worst case, though it may be of a single attack; None: of several. A side of several
    defenses counts with their mean. `judge` adds the columns that depend on the other tests.
    """
    task, attack, attacker, metric, step = keys[0]
    is_worst = len(keys) > 1 if is_worst is None else is_worst
    sign = table.sign(metric)
    statistic = gap_of_greatest(len(keys), sign)
    cells, seeds = paired_cells(table, keys, sides, "target")
    if not cells:
        return None
    found = estimate(cells, statistic, draws=draws)
    # innocents are compared for single attacks only: they have no worst case
    innocents, _ = paired_cells(table, keys, sides, "innocent") if not is_worst else ([], 0)
    kept = estimate(innocents, statistic, draws=draws) if innocents else None
    reached = [closest(cells, side, len(keys), sign) for side in (0, 1)]
    none = table.undefended[task]
    beside, _ = paired_cells(table, keys, (*sides, (none,)), "target") if none else ([], 0)
    low, high = found.interval()
    line = {
        "task": task,
        "metric": metric,
        "step": step,
        "attack": WORST if is_worst else attack,
        "attacker": "" if is_worst else attacker,
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
    """Return the columns on innocents: the same gap with reversed sign."""
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


def gap_of_greatest(attacks: int, sign: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return the statistic: the closest attack's score on the baseline minus the closest attack's on the defense."""

    def gap(means: np.ndarray) -> np.ndarray:
        of_attack = sign * means.mean(axis=(1, 3))  # [draws, 2 x attacks]
        return of_attack[:, attacks:].max(axis=1) - of_attack[:, :attacks].max(axis=1)

    return gap


def closest(cells: Sequence[np.ndarray], side: int, attacks: int, sign: int) -> float:
    """Return the score of the closest attack on one side, mean over concepts, prompts and seeds."""
    means = np.mean([x.mean(axis=(1, 2)) for x in cells], axis=0)
    return max((float(value) for value in means[side * attacks : (side + 1) * attacks]), key=lambda v: sign * v)
