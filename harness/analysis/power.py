"""How many seeds a claim needs, computed before the run from the variances of a pilot run. No torch, no files.

A claim is that of `harness.analysis.compare`: under an attack, one of two defenses protects more. How sure it is
depends on how much the difference of the two varies over seeds and prompts. A pilot of two or more seeds estimates both
variances as `compare` does, for every pair of its defenses, and their means are used: the two defenses of the claim are
assumed to vary as the pilot's do. Defenses made weak on purpose are left out. Of defenses that do not affect an
attacker, and so share their images, only one is used.

    difference    the difference to find, in the metric's unit; given as a share: of the attack's score on the
                  undefended model (SGR of the mean over targets)
    n_tests       attacks and worst case that are corrected together; the level is 5 % divided by their number, at which
                  Holm's correction makes the claim whatever the other tests give
    detectable    the least difference that the planned number of seeds finds in four of five runs
    seeds         how many seeds find the difference in four of five runs, with the pilot's variances as estimated
    seeds_safe    the same with upper limits of the variances, which are above the truth in four of five pilots:
                  variances from few seeds are often estimated far too small (`Estimate.cautious`)
    covers        the kinds of chance that are included; other concepts never are
    limit         why there is no number: prompts: their variance, which more seeds do not reduce, hides the difference;
                  seeds: more than `most` are needed; one seed: the pilot is too small; undefined: no score to take a
                  share of

The numbers of prompts and targets are assumed to be the pilot's. `tests/benchmarks/false_claims.py` counts how often
`compare` finds such differences.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from harness.analysis.compare import LEVEL, WORST, closest, gap_of_greatest
from harness.analysis.measurements import Measurements, measured
from harness.analysis.pairing import Key, paired_cells
from harness.analysis.statistics import Estimate, estimate

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "task", "metric", "attack", "attacker", "step", "n_targets", "n_prompts", "pilot_seeds", "n_pairs", "unit",
    "reached_none", "difference", "n_tests", "planned_seeds", "detectable", "seeds", "limit", "seeds_safe",
    "limit_safe", "covers",
)  # fmt: skip
POWER = 0.8
MOST = 1000

Asked = Collection[tuple[str, str, str]]
"""(task, metric, attack)."""


def seeds_needed(
    rows: DataFrame | Measurements,
    difference: float,
    *,
    is_share: bool = False,
    planned_seeds: int = 3,
    asked: Asked | None = None,
    between: tuple[str, str] | None = None,
    most: int = MOST,
    draws: int = 500,
) -> list[dict[str, Any]]:
    """Return a line for each task, metric and attack of the pilot, at the attack's last step, and the worst case.

    `asked`: only these attacks; `between`: only this pair of defenses. There is no line where no two defenses were
    attacked alike, or where all share their images.
    """
    table = measured(rows)
    wanted = [key for key in table.groups if asked is None or (key[0], key[3], key[1]) in asked]
    last: dict[tuple[str, str, str, str], Key] = {}
    for key in wanted:
        of_attack = (key[0], key[3], key[1], key[2])
        last[of_attack] = max(last.get(of_attack, key), key, key=lambda k: k[4])
    lines = []
    for task, metric in dict.fromkeys((key[0], key[3]) for key in last.values()):
        keys = [key for key in last.values() if (key[0], key[3]) == (task, metric)]
        latest = max(key[4] for key in keys)
        together = [key for key in wanted if (key[0], key[3], key[4]) == (task, metric, latest)]
        for of in [[key] for key in keys] + ([together] if len(together) > 1 else []):
            tests = sum((key[0], key[3], key[4]) == (task, metric, of[0][4]) for key in wanted)
            line = _line(table, of, tests + (tests > 1), between, draws)
            if line is not None:
                lines.append(line | _needed(line, difference, is_share, planned_seeds, most))
    return [{name: line[name] for name in COLUMNS} for line in lines]


def _line(
    table: Measurements, keys: list[Key], tests: int, between: tuple[str, str] | None, draws: int
) -> dict[str, Any] | None:
    """Return the pilot's columns for an attack, or for the worst case of several; None without two defenses."""
    task, attack, attacker, metric, step = keys[0]
    sign = table.sign(metric)
    defenses = [name for name in table.defenses[task] if name not in table.weak.get(task, ())]
    pairs = [between] if between else list(combinations(defenses, 2))
    met: set[str] = set()  # defenses that another one with the same images represents
    for first, second in pairs:
        if first not in met and _are_same(table, keys, first, second):
            met.add(second)
    pairs = [pair for pair in pairs if not met & set(pair)]
    found: dict[tuple[int, int, int], list[Estimate]] = {}
    for pair in pairs:
        cells, seeds = paired_cells(table, keys, [(name,) for name in pair], "target")
        if cells:
            shape = (seeds, len(cells), sum(x.shape[1] for x in cells))
            found.setdefault(shape, []).append(estimate(cells, gap_of_greatest(len(keys), sign), draws=draws))
    if not found:
        return None
    shape = max(found)  # in an unfinished pilot, the most complete pairs
    none = table.undefended[task]
    bare, _ = paired_cells(table, keys, [(none,)], "target") if none else ([], 0)
    pooled = _pooled(found[shape])
    return {
        "task": task,
        "metric": metric,
        "attack": attack if len(keys) == 1 else WORST,
        "attacker": attacker if len(keys) == 1 else "",
        "step": step,
        "n_targets": shape[1],
        "n_prompts": shape[2],
        "pilot_seeds": shape[0],
        "n_pairs": len(found[shape]),
        "unit": table.about[metric]["unit"],
        "reached_none": closest(bare, 0, len(keys), sign) if bare else None,
        "n_tests": tests,
        "covers": pooled.covers,
        "pooled": pooled,
    }


def _are_same(table: Measurements, keys: list[Key], first: str, second: str) -> bool:
    """Return whether two defenses affect none of the attacks, so that their difference has no variance."""
    return all(table.shares_images(key[0], key[1], key[2], first, second) for key in keys)


def _pooled(estimates: list[Estimate]) -> Estimate:
    """Return an estimate with the mean variances of several estimates of the same shape."""
    first, count = estimates[0], len(estimates)
    if first.variance_seeds is None:
        return first
    prompts = None if first.variance_prompts is None else sum(e.variance_prompts for e in estimates) / count
    return replace(first, variance_seeds=sum(e.variance_seeds for e in estimates) / count, variance_prompts=prompts)


def _needed(line: Mapping[str, Any], difference: float, is_share: bool, planned: int, most: int) -> dict[str, Any]:
    """Return the columns for a difference; it and the seeds are None without a score to take a share of."""
    if is_share:
        none = line["reached_none"]
        difference = difference * none if none is not None and none > 0 else None
    level = 1 - LEVEL / line["n_tests"]
    pooled: Estimate = line["pooled"]
    seeds, limit = _seeds(pooled, difference, level, most)
    safe, limit_safe = _seeds(pooled.cautious(), difference, level, most)
    return {
        "difference": difference,
        "planned_seeds": planned,
        "detectable": pooled.detectable(planned, POWER, level),
        "seeds": seeds,
        "limit": limit,
        "seeds_safe": safe,
        "limit_safe": limit_safe,
    }


def _seeds(pilot: Estimate, difference: float | None, level: float, most: int) -> tuple[int | None, str]:
    """Return how many seeds are needed, or None and why there is no number."""
    if pilot.variance_seeds is None:
        return None, "one seed"
    if difference is None:
        return None, "undefined"
    seeds = pilot.seeds_for(difference, POWER, level, most)
    if seeds is not None:
        return seeds, ""
    of_prompts = replace(pilot, variance_seeds=0.0).power(difference, most, level)
    return None, "prompts" if of_prompts < POWER else "seeds"
