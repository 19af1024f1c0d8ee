"""The section on frozen tensors: masks and what they save, from the run folder's masks.csv and adaptation_cost.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MASKS, COSTS, FIGURE = "masks.csv", "adaptation_cost.csv", "masks.png"
_SHOWN = (
    "frozen_tensors", "frozen_parameters", "correlation_with_start", "correlation_with_signal", "overlap_of_seeds",
    "overlap_by_chance", "overlap_with_random",
)  # fmt: skip


def of_run(folder: Path) -> dict[str, Any] | None:
    """Return what the section shows; None where nothing was frozen, or the tables are not there."""
    masks, costs = _read(folder / MASKS), _read(folder / COSTS)
    if not masks:
        return None
    grouped: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in masks:
        grouped.setdefault((row.get("task", ""), row.get("defense", "")), []).append(row)
    return {
        "figure": (folder / FIGURE).is_file(),
        "masks": [
            {"task": task, "defense": defense, "n": len(rows), **{name: _mean(rows, name) for name in _SHOWN}}
            for (task, defense), rows in grouped.items()
        ],
        "costs": [
            {
                **{name: row.get(name, "") for name in ("task", "defense", "attack", "attacker")},
                **{name: _mean([row], name) for name in row if name.endswith(("_bytes", "_ratio", "_step"))},
            }
            for row in costs
        ],
    }


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []


def _mean(rows: Sequence[Mapping[str, str]], column: str) -> float | None:
    """Return the mean of the numbers in a column; None without any."""
    values = []
    for row in rows:
        try:
            value = float(row.get(column) or "nan")
        except ValueError:
            continue
        if math.isfinite(value):
            values.append(value)
    return sum(values) / len(values) if values else None
