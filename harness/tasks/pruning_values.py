"""Measured values of pruning tasks: which rows a measure has, by concept, prompt and seed, and how models are stacked.

The registry imports this module with the tasks, so numpy is imported inside functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame

    from harness.analysis import statistics

Line = dict[str, Any]
Values = tuple[tuple[int, ...], "np.ndarray"]
"""Seeds, and values [prompts, seeds]."""
CP, CP_DISTILLED = "cp", "cp_distilled"
"""The share of a target's prompts that fit the model's image less than the base model's, or the control's, with one
seed."""
ALL = "all"
"""The targets of lines over all sets of a task together."""


def measured(rows: DataFrame) -> DataFrame:
    """Return the rows before any attack, without references, with a column `measure`.

    A measure is the part or role: general, works, target, innocent, utility.
    """
    own = rows[(rows["attack"] == "") & ~rows["role"].isin(("real", "floor"))]
    return own.assign(measure=own["role"].astype(str).where(own["part"] != "works", "works"))


def values_of(rows: DataFrame) -> dict[tuple[str, str], Values]:
    """Return (set of targets, concept) -> values, for whole seeds."""
    from harness.analysis.cells import cells

    found = cells(rows, ["protected", "concept"])
    return {(str(label[0]), str(label[1])): (cell.seeds, cell.values.T) for label, cell in found.items()}


def stacked(models: Sequence[Mapping[Any, Values]]) -> tuple[list[np.ndarray], int]:
    """Return (an array [models, prompts, seeds] of each concept that all have, number of seeds that all have).

    ([], 0): there are none.
    """
    import numpy as np

    names = [name for name in models[0] if all(name in model for model in models)] if models else []
    known = [set(model[name][0]) for model in models for name in names]
    seeds = sorted(set.intersection(*known)) if known else []
    if not seeds:
        return [], 0
    return [
        np.stack([model[name][1][:, [model[name][0].index(s) for s in seeds]] for model in models]) for name in names
    ], len(seeds)


def interval_of(name: str, of: statistics.Estimate | None) -> Line:
    """Return an estimate and its limits as columns; None where there is none, or where it is undefined."""
    if of is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    low, high = (None if limit is None or not math.isfinite(limit) else limit for limit in of.interval())
    return {name: of.value, f"{name}_low": low, f"{name}_high": high}


def leading_target_metric(lines: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the first metric of targets, one that is no alignment with text if there is one."""
    texts = {CP, CP_DISTILLED, *(line["metric"] for line in lines if line["measure"] == "general")}
    listed = [line["metric"] for line in lines if line["measure"] == "target"]
    return next((metric for metric in listed if metric not in texts), listed[0] if listed else None)


def shown_measures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return the (measure, metric) that tables for people show; all are in the file."""
    leading = leading_target_metric(lines)
    known = dict.fromkeys((line["measure"], line["metric"]) for line in lines)
    return [
        (measure, metric) for measure, metric in known
        if measure in ("general", "works") or metric in (leading, CP_DISTILLED)
    ]  # fmt: skip


def groups_of(sets: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Return (targets of the lines, sets of targets): each set, then all together if there are more."""
    names = list(dict.fromkeys(map(str, sets)))
    return [*((name, [name]) for name in names), *([(ALL, names)] if len(names) > 1 else [])]


def over_all(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines over all sets of a task, or those of its only one: what tables for people show."""
    pooled = {line["task"] for line in lines if line["targets"] == ALL}
    return [line for line in lines if line["targets"] == ALL or line["task"] not in pooled]
