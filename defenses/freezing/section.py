"""The section on frozen tensors, from the run folder's masks.csv, masks_against_random.csv and adaptation_cost.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MASKS, AGAINST, COSTS = "masks.csv", "masks_against_random.csv", "adaptation_cost.csv"
FIGURES = ("masks.png", "masks_against_random.png")
_NAMES = ("task", "defense", "protected")
_SHOWN = (
    "frozen_tensors", "frozen_parameters", "overlap_without_data", "correlation_with_signal", "overlap_of_seeds",
    "overlap_by_chance", "overlap_p",
)  # fmt: skip
_NUMBERS = (
    "frozen", "frozen_random", "step", "reached_baseline", "reached_defense", "stronger_by", "low", "high",
    "p_corrected", "retained_by",
)  # fmt: skip


def of_run(folder: Path) -> dict[str, Any] | None:
    """Return what the section shows; None where nothing was frozen, or the tables are not there."""
    masks, costs = _read(folder / MASKS), _read(folder / COSTS)
    if not masks:
        return None
    grouped: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in masks:
        grouped.setdefault(tuple(row.get(name, "") for name in _NAMES), []).append(row)
    return {
        "figures": [name for name in FIGURES if (folder / name).is_file()],
        "against": [
            {
                **{name: row.get(name, "") for name in ("task", "metric", "family", "attack", "attacker", "verdict")},
                **{name: _mean([row], name) for name in _NUMBERS},
            }
            for row in _read(folder / AGAINST)
            if row.get("is_together") == "true"
        ],
        "masks": [
            {**dict(zip(_NAMES, names, strict=True)), "n": len(rows), **{name: _mean(rows, name) for name in _SHOWN}}
            for names, rows in grouped.items()
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
