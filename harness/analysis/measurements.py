"""Rows put in order: means over prompts of every defense, attack, metric, step, role, concept and seed. No files.

Rows are a DataFrame with the columns that `harness.results.rows` names. They are grouped at once, by whole columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame, Series

Cell = tuple[str, str]
"""(protected set, concept)."""
Trial = tuple[str, str, int]
"""(protected set, concept, seed)."""

ABOUT = ("task", "defense", "attack", "attacker", "metric", "step", "role")
"""What is measured together."""
TRIAL = ("protected", "concept", "seed")
_SAMPLED = ("task", "defense", "attack", "attacker")


class Measurements:
    """The values of rows, and the labels that group them, in order of first appearance."""

    def __init__(self, rows: DataFrame):
        import numpy as np

        group = _numbered(rows, (*ABOUT, *TRIAL))
        by_group = np.argsort(group, kind="stable")
        counts = np.bincount(group)
        self._ends = np.cumsum(counts)
        self._sorted = rows["value"].to_numpy(dtype=float)[by_group]
        firsts = by_group[self._ends - counts] if len(rows) else by_group
        frame = rows.iloc[firsts].reset_index(drop=True)
        frame = frame.drop(columns=["value", "prompt_index", "prompt", "score_key"])
        self.frame: DataFrame = frame.assign(n_values=counts, mean=exact_means(self._sorted, self._ends))
        """One line each (task, ..., role; protected set, concept, seed): the labels of its first row, its mean."""
        self._trials: list[Trial] = list(zip(*(frame[name].tolist() for name in TRIAL), strict=True))
        self._means: list[float] = self.frame["mean"].tolist()
        self._places = _places(frame, ABOUT)
        self._found: dict[tuple, dict[Trial, float]] = {}
        self._samples = self._samples_of(rows, group)
        directed = frame[frame["direction"] != "none"]
        without = frame.loc[frame["direction"] == "none", "metric"]
        self.guard: str | None = None if without.empty else without.iloc[0]
        """The metric that separates copying from learning."""
        self.about: dict[str, Mapping[str, Any]] = _first_lines(directed, "metric")
        """metric -> its first row; metrics that have a direction."""
        released = directed[~directed["role"].isin(("real", "floor")) & (directed["defense"] != "original")]
        self.defenses: dict[str, dict[str, Mapping[str, Any]]] = {}
        """task -> defense -> its first row."""
        self.undefended: dict[str, str | None] = {}
        """task -> the label of the defense `none`."""
        self.weak: dict[str, list[str]] = {}
        """task -> defenses that were made weak on purpose."""
        for (task, defense), first in _first_lines(released, ["task", "defense"]).items():
            self.defenses.setdefault(task, {})[defense] = first
            self.undefended.setdefault(task, None)
            if first["method"] == "none":
                self.undefended[task] = defense
            if first["is_weak"]:
                self.weak.setdefault(task, []).append(defense)
        names = ["task", "attack", "attacker", "metric", "step"]
        attacked = released[released["attack"] != ""].drop_duplicates(names)
        self.groups: list[tuple[str, str, str, str, int]] = list(
            zip(*(attacked[name].tolist() for name in names), strict=True)
        )
        """(task, attack, attacker, metric, step) of attacked trials, by metrics that have a direction."""
        self.probes: dict[tuple[str, str, str], int] = {
            group[:3]: probes for group, probes in zip(self.groups, attacked["n_probes"].tolist(), strict=True)
        }
        """(task, attack, attacker) -> how many probes it made before."""

    def sign(self, metric: str) -> int:
        """Return 1 where greater values mean more similarity, -1 where they mean less."""
        return -1 if self.about[metric]["direction"] == "lower" else 1

    def values(
        self, task: str, defense: str, attack: str, attacker: str, metric: str, step: int, role: str
    ) -> Mapping[Trial, Sequence[float]]:
        """Return trial -> values by prompt, in the order of the rows; one value of a metric of whole sets."""
        places = self._places.get((task, defense, attack, attacker, metric, step, role), ())
        ends, counts = self._ends, self.frame["n_values"].to_numpy()
        return {self._trials[place]: self._sorted[ends[place] - counts[place] : ends[place]] for place in places}

    def means(
        self, task: str, defense: str, attack: str, attacker: str, metric: str | None, step: int, role: str
    ) -> Mapping[Trial, float]:
        """Return trial -> mean over prompts."""
        key = (task, defense, attack, attacker, metric, step, role)
        if key not in self._found:
            self._found[key] = {self._trials[place]: self._means[place] for place in self._places.get(key, ())}
        return self._found[key]

    def shares_images(self, task: str, attack: str, attacker: str, defense: str, other: str) -> bool:
        """Return whether two defenses share the stages of the attack's images, wherever both were attacked.

        They do when neither affects the attack. Compared by key, not by value: scores may agree for other reasons.
        """
        first, second = (self._samples.get((task, name, attack, attacker), {}) for name in (defense, other))
        both = first.keys() & second.keys()
        return bool(both) and all(first[trial] == second[trial] for trial in both)

    def _samples_of(self, rows: DataFrame, group: np.ndarray) -> dict[tuple[str, str, str, str], dict[Trial, str]]:
        """Return (task, defense, attack, attacker) -> trial -> key of its images, as the last of its rows names it."""
        import numpy as np

        sampled = _numbered(self.frame, (*_SAMPLED, *TRIAL))
        last = np.full(sampled.max(initial=-1) + 1, -1, dtype=np.int64)
        is_named = (rows["sample_key"] != "").to_numpy()
        last[sampled[group[is_named]]] = np.flatnonzero(is_named)  # of equal places the last one stays
        named = rows.iloc[last[last >= 0]]
        keys = named["sample_key"].tolist()
        trials = list(zip(*(named[name].tolist() for name in TRIAL), strict=True))
        places = _places(named, _SAMPLED)
        return {name: {trials[place]: keys[place] for place in own} for name, own in places.items()}


def measured(rows: DataFrame | Measurements) -> Measurements:
    """Return rows put in order."""
    return rows if isinstance(rows, Measurements) else Measurements(rows)


def exact_means(values: np.ndarray, ends: np.ndarray) -> list[float]:
    """Return the mean of each stretch of consecutive values, by their ends; sums are exact."""
    listed, bounds = values.tolist(), [0, *ends.tolist()]
    return [
        math.fsum(listed[start:end]) / (end - start) for start, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _numbered(rows: DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return for each row the number of its combination of labels, numbered in order of first appearance."""
    import numpy as np
    import pandas as pd

    combined, size = np.zeros(len(rows), dtype=np.int64), 1
    for name in names:
        codes, count = _codes(rows[name])
        if size * count > 2**62:
            combined, known = pd.factorize(combined)
            size = len(known)
        combined, size = combined * count + codes, size * count
    return pd.factorize(combined)[0]


def _codes(column: Series) -> tuple[np.ndarray, int]:
    """Return the codes of a column's labels, and how many labels there are at most."""
    import pandas as pd

    if hasattr(column, "cat"):
        return column.cat.codes.to_numpy(), max(1, len(column.cat.categories))
    codes, known = pd.factorize(column.to_numpy())
    return codes, max(1, len(known))


def _places(rows: DataFrame, names: Sequence[str]) -> dict[tuple, list[int]]:
    """Return combination of labels -> the places of its rows, both in order of first appearance."""
    import numpy as np

    group = _numbered(rows, names)
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group))
    parts = [part.tolist() for part in np.split(order, ends[:-1])] if len(rows) else []
    firsts = rows.iloc[[part[0] for part in parts]]
    return dict(zip(zip(*(firsts[name].tolist() for name in names), strict=True), parts, strict=True))


def _first_lines(rows: DataFrame, names: str | list[str]) -> dict[Any, Mapping[str, Any]]:
    """Return label, or combination of labels -> its first row, in order."""
    firsts = rows.drop_duplicates(names)
    lines = firsts.to_dict("records")
    if isinstance(names, str):
        return {line[names]: line for line in lines}
    return {tuple(line[name] for name in names): line for line in lines}
