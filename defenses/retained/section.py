"""The report's section on bounds, from the run folder's retention.csv and retention_knob.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.contracts.diagnostic import PageSection
from harness.results.reading import mean_of, read_table

RETENTION, KNOB = "retention.csv", "retention_knob.csv"
FIGURES = ("retention.png", "retention_knob.png")
TEMPLATE = Path(__file__).with_name("section.html.jinja")
_NAMES = ("task", "defense", "protected", "by", "kept_images", "bound")


def of_run(folder: Path) -> PageSection | None:
    """Return the section; None if nothing was bounded, or the table is missing."""
    rows = read_table(folder / RETENTION)
    if not rows:
        return None
    figures = tuple(name for name in FIGURES if (folder / name).is_file())
    return PageSection(
        title="Bounds on what must stay",
        anchor="retention",
        template=TEMPLATE.read_text(encoding="utf-8"),
        context={"figures": figures, "bounds": _bounds(rows)},
        figures=figures,
        data=tuple(name for name in (RETENTION, KNOB) if (folder / name).is_file()),
    )


def _bounds(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return a line for each defense and protected set: means over its trainings."""
    grouped: dict[tuple[str, ...], dict[tuple[str, str], list[dict[str, str]]]] = {}
    for row in rows:
        trainings = grouped.setdefault(tuple(row.get(name, "") for name in _NAMES), {})
        trainings.setdefault((row.get("seed", ""), row.get("part", "")), []).append(row)
    found = []
    for names, trainings in grouped.items():
        about = dict(zip(_NAMES, names, strict=True))
        bound = mean_of([about], "bound")
        ends = [max(own, key=lambda row: int(row.get("round") or 0)) for own in trainings.values()]
        smoothed = [ratio for own in trainings.values() for row in own if (ratio := mean_of([row], "smoothed_ratio"))]
        found.append(
            {
                **about,
                "bound": bound,
                "n": len(trainings),
                "end_ratio": mean_of(ends, "smoothed_ratio"),
                "highest_ratio": max(smoothed, default=None),
                "above": sum(ratio > bound for ratio in smoothed) / len(smoothed) if smoothed and bound else None,
                "multiplier": mean_of(ends, "multiplier"),
            }
        )
    return found
