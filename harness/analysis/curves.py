"""How soon an attack recovers: whole trajectories as one line each. Pure arithmetic, no torch, no files.

    share          (M - M_before) / (M_real - M_before), mean over targets: how far the attack has come from the
                   undefended model before it (0) to real images (1). M is the mean over prompts and seeds. Unlike
                   `recovery` it does not depend on the undefended attack's score, so attacks can be compared by it.
    steps_to_half  the step at which the share first reaches one half, interpolated between the read steps linearly in
                   log(step + 1). Empty: not reached within the trained steps.
    area           mean share from step 0 to the last step, over log(step + 1): small is strong protection.

`_none`: for the same attack on the undefended model. The leaderboard says whether an attack counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.analysis.measurements import Measurements, Trial, measured

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "suite", "model", "task", "defense", "method", "profile", "is_weak", "attack", "attacker", "n_probes", "metric",
    "n_targets", "last_step", "steps_to_half", "steps_to_half_none", "area", "area_none",
)  # fmt: skip
HALF = 0.5


def curves(rows: DataFrame | Measurements) -> list[dict[str, Any]]:
    """Return a line for each task, metric, attack and defense, in the order of the rows."""
    table = measured(rows)
    steps: dict[tuple[str, str, str, str], list[int]] = {}
    for task, attack, attacker, metric, step in table.groups:
        if step == 0:  # an attack that takes no step has no trajectory
            continue
        steps.setdefault((task, metric, attack, attacker), []).append(step)
    lines = []
    for (task, metric, attack, attacker), read in steps.items():
        none = table.undefended[task]
        if none is None:
            continue
        bare = _curve(table, task, none, attack, attacker, metric, sorted(read))
        for defense, first in table.defenses[task].items():
            curve = _curve(table, task, defense, attack, attacker, metric, sorted(read))
            if curve is None:
                continue
            lines.append(
                {
                    **{name: first[name] for name in ("suite", "model")},
                    "task": task,
                    "defense": defense,
                    "method": first["method"],
                    "profile": first["profile"],
                    "is_weak": defense in table.weak.get(task, ()),
                    "attack": attack,
                    "attacker": attacker,
                    "n_probes": table.probes.get((task, attack, attacker), 0),
                    "metric": metric,
                    "n_targets": curve[1],
                    "last_step": max(read),
                    "steps_to_half": steps_to(curve[0]),
                    "steps_to_half_none": steps_to(bare[0]) if bare else None,
                    "area": area(curve[0]),
                    "area_none": area(bare[0]) if bare else None,
                }
            )
    return lines


def steps_to(curve: Sequence[tuple[int, float]], share: float = HALF) -> float | None:
    """Return the step at which a curve of (step, share), sorted by step, first reaches `share`; None: never."""
    last: tuple[int, float] | None = None
    for step, value in curve:
        if value >= share:
            if last is None:
                return float(step)
            part = (share - last[1]) / (value - last[1])
            return math.expm1(math.log1p(last[0]) + part * (math.log1p(step) - math.log1p(last[0])))
        last = step, value
    return None


def area(curve: Sequence[tuple[int, float]]) -> float | None:
    """Return the mean share of a curve over log(step + 1); None for a single point."""
    if len(curve) < 2:
        return None
    places = [(math.log1p(step), value) for step, value in curve]
    pairs = zip(places, places[1:], strict=False)
    total = math.fsum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in pairs)
    return total / (places[-1][0] - places[0][0])


def _curve(
    table: Measurements, task: str, defense: str, attack: str, attacker: str, metric: str, steps: Sequence[int]
) -> tuple[list[tuple[int, float]], int] | None:
    """Return ((step, share) from step 0 on, number of targets) over targets that have every step; None without any."""
    start = _by_cell(table.means(task, table.undefended[task], "", "", metric, 0, "target"))
    real = _by_cell(table.means(task, "", "", "", metric, 0, "real"))
    points = [(0, _by_cell(table.means(task, defense, "", "", metric, 0, "target")))]
    points += [(s, _by_cell(table.means(task, defense, attack, attacker, metric, s, "target"))) for s in steps]
    whole = [
        cell
        for cell in points[-1][1]
        if cell in start and cell in real and real[cell] != start[cell] and all(cell in found for _, found in points)
    ]
    if not whole:
        return None
    curve = [
        (step, math.fsum((found[c] - start[c]) / (real[c] - start[c]) for c in whole) / len(whole))
        for step, found in points
    ]
    return curve, len(whole)


def _by_cell(values: Mapping[Trial, float]) -> dict[tuple[str, str], float]:
    """Return (protected set, concept) -> mean over seeds."""
    grouped: dict[tuple[str, str], list[float]] = {}
    for (protected, concept, _), value in values.items():
        grouped.setdefault((protected, concept), []).append(value)
    return {cell: math.fsum(listed) / len(listed) for cell, listed in grouped.items()}
