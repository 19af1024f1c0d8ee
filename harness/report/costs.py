"""The report's section on the cost of adaptations, from the run folder's adaptation_cost.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.results.reading import mean_of, read_table

FILE = "adaptation_cost.csv"
_WORDS = ("task", "defense", "attack", "attacker")
_NUMBERS = (
    "trained_bytes", "optimizer_bytes", "peak_memory_bytes", "seconds_per_step", "trained_ratio", "peak_memory_ratio",
    "time_ratio",
)  # fmt: skip


def of_run(folder: Path) -> list[dict[str, Any]]:
    """Return a line for each task, defense and attack; [] if there are no adaptations."""
    return [
        {**{name: row.get(name, "") for name in _WORDS}, **{name: mean_of([row], name) for name in _NUMBERS}}
        for row in read_table(folder / FILE)
    ]
