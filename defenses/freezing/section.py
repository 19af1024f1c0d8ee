"""The report's section on frozen tensors, from the run folder's masks.csv and masks_against_random.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.contracts.diagnostic import PageSection
from harness.results.reading import mean_of, read_table

MASKS, AGAINST = "masks.csv", "masks_against_random.csv"
FIGURES = ("masks.png", "masks_against_random.png")
TEMPLATE = Path(__file__).with_name("section.html.jinja")
_NAMES = ("task", "defense", "protected")
_SHOWN = (
    "frozen_tensors", "frozen_parameters", "overlap_without_data", "correlation_with_signal", "overlap_of_seeds",
    "overlap_by_chance", "overlap_p",
)  # fmt: skip
_NUMBERS = (
    "frozen", "frozen_random", "step", "reached_baseline", "reached_defense", "stronger_by", "low", "high",
    "p_corrected", "retained_by",
)  # fmt: skip


def of_run(folder: Path) -> PageSection | None:
    """Return the section; None if nothing was frozen, or the tables are missing."""
    rows = read_table(folder / MASKS)
    if not rows:
        return None
    figures = tuple(name for name in FIGURES if (folder / name).is_file())
    return PageSection(
        title="Frozen tensors",
        anchor="frozen",
        template=TEMPLATE.read_text(encoding="utf-8"),
        context={"figures": figures, "masks": _masks(rows), "against": _against(read_table(folder / AGAINST))},
        figures=figures,
        data=(MASKS, AGAINST),
    )


def _masks(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a line for each defense and protected set: means over seeds."""
    grouped: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row.get(name, "") for name in _NAMES), []).append(row)
    return [
        {**dict(zip(_NAMES, names, strict=True)), "n": len(own), **{name: mean_of(own, name) for name in _SHOWN}}
        for names, own in grouped.items()
    ]


def _against(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the lines for all ratios together."""
    words = ("task", "metric", "family", "attack", "attacker", "verdict")
    return [
        {**{name: row.get(name, "") for name in words}, **{name: mean_of([row], name) for name in _NUMBERS}}
        for row in rows
        if row.get("is_together") == "true"
    ]
