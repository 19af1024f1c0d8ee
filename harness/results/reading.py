"""Read tables of a run folder for its report."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.results.cells import from_cell


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the lines of a CSV file as text; [] if it is missing or cannot be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        return []
    return [{name: from_cell(cell) if isinstance(cell, str) else cell for name, cell in line.items()} for line in lines]


def mean_of(lines: Iterable[Mapping[str, str]], column: str) -> float | None:
    """Return the mean of the finite numbers in a column; None if there are none."""
    values = []
    for line in lines:
        try:
            value = float(line.get(column) or "nan")
        except ValueError:
            continue
        if math.isfinite(value):
            values.append(value)
    return sum(values) / len(values) if values else None
