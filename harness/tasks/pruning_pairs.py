"""Recipes against each other: differences of all pairs, and suppression at equal quality.

Everything is paired by set of targets, concept, prompt and seed, for each set and, if there are more, for all together.
The registry imports this module with the tasks, so numpy is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from harness.tasks.pruning_columns import EQUAL, PAIRS
from harness.tasks.pruning_form import PRUNED, UNPRUNED
from harness.tasks.pruning_values import Line, Values, groups_of, interval_of, measured, stacked, values_of

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.analysis.statistics import Resampled

ByRecipe = Mapping[str, Mapping[tuple[str, str], Values]]
"""Recipe -> (targets, concept) -> values."""
ABOUT_TARGETS = frozenset({"target", "works"})


@dataclass(frozen=True)
class _Group:
    """What was measured in a task on one set of targets, or on all of them."""

    task: str
    targets: str
    first: Mapping[str, Mapping[str, Any]]  # recipe -> its first row
    directions: Mapping[tuple[str, str], str]
    by_measure: Mapping[tuple[str, str], ByRecipe]  # by (measure, metric)


def pairs(rows: DataFrame) -> Iterator[Line]:
    """Yield a line for each two recipes, the control left out, and each measure and metric; Holm over the pairs."""
    from harness.analysis import statistics

    for group in _groups(rows):
        for (measure, metric), by_recipe in group.by_measure.items():
            names = [name for name in by_recipe if group.first[name]["method"] != "none"]
            cells, seeds = stacked([by_recipe[name] for name in names])
            if len(names) < 2 or not cells:
                continue
            means = statistics.resample(cells)
            both = list(combinations(range(len(names)), 2))
            found = [means.estimate(lambda m, a=a, b=b: m[:, a] - m[:, b]) for a, b in both]
            corrected = statistics.holm([each.p_value() for each in found])
            for (a, b), estimate, p in zip(both, found, corrected, strict=True):
                yield dict.fromkeys(PAIRS) | {
                    "task": group.task, "targets": group.targets, "measure": measure, "metric": metric,
                    "direction": group.directions[measure, metric], "recipe": names[a], "other": names[b],
                    "n_concepts": len(cells), "n_seeds": seeds, "p": p, **interval_of("difference", estimate),
                }  # fmt: skip


def at_equal_quality(rows: DataFrame) -> Iterator[Line]:
    """Yield a line for each recipe beside each curve: its similarity to the targets less the curve's at its quality.

    The curve's is the best that it reaches at that quality or a better one.

    A curve begins at the control, and joins recipes that end in one method and profile, of which there must be two or
    more: they differ in strength. Holm over the lines of one quality and one similarity.
    """
    from harness.analysis import tradeoff
    from harness.analysis.statistics import holm

    for group in _groups(rows):
        qualities = [of for of in group.by_measure if of[0] == "general"]
        similarities = [of for of in group.by_measure if of[0] in ABOUT_TARGETS]
        for quality in qualities:
            for similarity in similarities:
                lines, p_values = [], []
                names, both, seeds = _both(group.by_measure[quality], group.by_measure[similarity])
                for curve, places in _curves(names, group.first).items():
                    for place, name in enumerate(names):
                        if place in places or both is None:
                            continue
                        found = tradeoff.beside(
                            both, places, place, less_is_better=group.directions[quality] == "lower",
                            less_is_wanted=group.directions[similarity] == "higher",  # to be unlike the concept
                        )  # fmt: skip
                        lines.append(dict.fromkeys(EQUAL) | {
                            "task": group.task, "targets": group.targets, "quality": quality[1],
                            "measure": similarity[0], "metric": similarity[1],
                            "direction": group.directions[similarity], "recipe": name, "curve": curve,
                            "n_settings": len(places) - 1, "n_seeds": seeds,
                            "recipe_quality": both.value[place], "recipe_similarity": both.value[len(names) + place],
                            **interval_of("difference", found),
                        })  # fmt: skip
                        p_values.append(None if found is None else found.p_value())
                for line, p in zip(lines, holm(p_values), strict=True):
                    yield line | {"p": p}


def _groups(rows: DataFrame) -> Iterator[_Group]:
    """Yield each set of targets of each task, then all of a task together if there are more."""
    own = measured(rows)
    own = own[~own["defense"].isin((UNPRUNED, PRUNED))]
    for task, of_task in own.groupby("task", sort=False, observed=True):
        for targets, kept in groups_of(of_task["protected"]):
            group = of_task[of_task["protected"].isin(kept)]
            by_measure, directions = {}, {}
            for (measure, metric), part in group.groupby(["measure", "metric"], sort=False, observed=True):
                place = str(measure), str(metric)
                directions[place] = str(part["direction"].iloc[0])
                by_measure[place] = {
                    str(label): values_of(each)
                    for label, each in part.groupby("defense", sort=False, observed=True)
                }
            first = {
                str(label): part.iloc[0] for label, part in group.groupby("defense", sort=False, observed=True)
            }  # fmt: skip
            yield _Group(str(task), str(targets), first, directions, by_measure)


def _curves(names: Sequence[str], first: Mapping[str, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the curves with two settings or more: name -> indices, the control first."""
    start = next((place for place, name in enumerate(names) if first[name]["method"] == "none"), None)
    if start is None:
        return {}
    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        if place != start:
            about = " ".join(part for part in (str(first[name]["method"]), str(first[name]["profile"])) if part)
            found.setdefault(about, [start]).append(place)
    return {name: places for name, places in found.items() if len(places) > 2}


def _both(qualities: ByRecipe, similarities: ByRecipe) -> tuple[list[str], Resampled | None, int]:
    """Return (recipes, means of their qualities and then of their similarities, number of seeds).

    The quality of a set of targets and a seed stands at each of its targets' prompts, so that both are drawn together.
    """
    import numpy as np

    from harness.analysis import statistics

    names = [name for name in similarities if name in qualities]
    spread = []
    for name in names:
        by_set = {targets: each for (targets, _), each in qualities[name].items()}
        own = {}
        for (targets, concept), (seeds, values) in similarities[name].items():
            if targets in by_set:
                known, found = by_set[targets]
                row = dict(zip(known, found.mean(axis=0), strict=True))
                shared = tuple(seed for seed in seeds if seed in row)
                if shared:
                    own[targets, concept] = shared, np.tile([row[seed] for seed in shared], (len(values), 1))
        spread.append(own)
    cells, seeds = stacked([*spread, *(similarities[name] for name in names)])
    return (names, statistics.resample(cells), seeds) if cells else ([], None, 0)
