"""Rows put in order: values of every defense, attack, metric, step and role, by concept and seed. No torch, no files.

Rows are read once, one by one, so a million of them need no more memory than their values do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Cell = tuple[str, str]
"""(protected set, concept)."""
Trial = tuple[str, str, int]
"""(protected set, concept, seed)."""


class Measurements:
    """What rows hold, and what there is to group it by, in order of first appearance."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.groups: list[tuple[str, str, str, str, int]] = []
        """(task, attack, attacker, metric, step) of attacked trials, by metrics that have a direction."""
        self.defenses: dict[str, dict[str, Mapping[str, Any]]] = {}
        """task -> defense -> its first row."""
        self.undefended: dict[str, str | None] = {}
        """task -> the label of the defense `none`."""
        self.weak: dict[str, list[str]] = {}
        """task -> defenses that were made weak on purpose."""
        self.about: dict[str, Mapping[str, Any]] = {}
        """metric -> its first row; metrics that have a direction."""
        self.probes: dict[tuple[str, str, str], int] = {}
        """(task, attack, attacker) -> how often it tried before."""
        self.guard: str | None = None
        """The metric that tells copying from learning."""
        self._values: dict[tuple, dict[Trial, list[float]]] = {}
        self._means: dict[tuple, dict[Trial, float]] = {}
        self._samples: dict[tuple[str, str, str, str], dict[Trial, str]] = {}
        seen: dict[tuple, None] = {}
        for row in rows:
            self._take(row, seen)
        self.groups = list(seen)

    def _take(self, row: Mapping[str, Any], seen: dict[tuple, None]) -> None:
        task, defense, attack, metric = row["task"], row["defense"], row["attack"], row["metric"]
        key = (task, defense, attack, row["attacker"], metric, int(row["step"]), row["role"])
        trial = (row["protected"], row["concept"], int(row["seed"]))
        self._values.setdefault(key, {}).setdefault(trial, []).append(float(row["value"]))
        if row.get("sample_key"):
            self._samples.setdefault((task, defense, attack, row["attacker"]), {})[trial] = row["sample_key"]
        if row["direction"] == "none":
            self.guard = self.guard or metric
            return
        if metric not in self.about:
            self.about[metric] = row
        if row["role"] in ("real", "floor") or defense == "original":
            return
        known = self.defenses.setdefault(task, {})
        if defense not in known:
            known[defense] = row
            self.undefended.setdefault(task, None)
            if row["method"] == "none":
                self.undefended[task] = defense
            if row.get("is_weak") in (True, "true"):
                self.weak.setdefault(task, []).append(defense)
        if attack:
            group = (task, attack, row["attacker"], metric, key[5])
            if group not in seen:
                seen[group] = None
                self.probes[group[:3]] = int(row.get("n_probes", 0))

    def sign(self, metric: str) -> int:
        """Return 1 where greater values mean more similarity, -1 where they mean less."""
        return -1 if self.about[metric]["direction"] == "lower" else 1

    def values(
        self, task: str, defense: str, attack: str, attacker: str, metric: str, step: int, role: str
    ) -> Mapping[Trial, list[float]]:
        """Return trial -> values by prompt, in the order of the rows; one value of a metric of whole sets."""
        return self._values.get((task, defense, attack, attacker, metric, step, role), {})

    def means(
        self, task: str, defense: str, attack: str, attacker: str, metric: str, step: int, role: str
    ) -> Mapping[Trial, float]:
        """Return trial -> mean over prompts."""
        key = (task, defense, attack, attacker, metric, step, role)
        if key not in self._means:
            values = self._values.get(key, {})
            self._means[key] = {trial: math.fsum(listed) / len(listed) for trial, listed in values.items()}
        return self._means[key]

    def shares_images(self, task: str, attack: str, attacker: str, defense: str, other: str) -> bool:
        """Tell whether the attack's images are the very same stages' for two defenses, wherever both were attacked.

        So it is where the attacker feels neither: by identity, not by value, as scores may agree for other reasons.
        """
        first, second = (self._samples.get((task, name, attack, attacker), {}) for name in (defense, other))
        both = first.keys() & second.keys()
        return bool(both) and all(first[trial] == second[trial] for trial in both)


def measured(rows: Iterable[Mapping[str, Any]] | Measurements) -> Measurements:
    """Return rows put in order."""
    return rows if isinstance(rows, Measurements) else Measurements(rows)
