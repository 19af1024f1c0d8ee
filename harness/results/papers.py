"""Papers' numbers beside a run's: rows of the same tasks and of defenses that the suite measures. Never mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from defenses.freezing.tables import METHODS
from harness.analysis.paper_rows import COLUMNS, PaperRow, load
from harness.core.files import write_text
from harness.results.rows import write_csv
from harness.suite.spec import Suite

FILE = "paper_rows"
SHOWN = ("model", "task", "defense", "attack", "setting", "metric", "unit", "printed", "note")
LEGEND = (
    "As printed: models, data, budgets, encoders and prompts are the papers' own, so a number here and one of the "
    "leaderboard are two measurements of two things. second-hand: another document quotes the paper; third-party: "
    "others measured it; figure: read off a plot."
)


def beside(suite: Suite) -> list[PaperRow]:
    """Return the rows of papers that stand beside a suite: of its tasks' kinds, its defenses, and real images.

    Tables on freezing speak of adaptation, whether concepts were erased before or not; their IMMA stands beside
    `joint`, which is IMMA on several concepts, and their UCE beside `none` where a task erases.
    """
    tasks = {"relearning"} if any(task.erase for task in suite.tasks.values()) else set()
    if any(not task.erase for task in suite.tasks.values()):
        tasks |= {"personalization", "adaptation"}
    defenses = {spec.method for spec in suite.defenses} | {""}
    freezes = bool(defenses & set(METHODS))
    of_freezing = ({"imma"} if "joint" in defenses else set()) | ({"uce"} if "relearning" in tasks else set())

    def stands_beside(row: PaperRow) -> bool:
        if freezes and row.paper == "freezeasguard":
            return row.task in tasks | {"adaptation"} and row.defense in defenses | of_freezing
        return row.task in tasks and row.defense in defenses

    return [row for row in load() if stands_beside(row)]


def write(rows: Sequence[PaperRow], folder: Path) -> None:
    """Write paper_rows.csv and .md into a run's folder."""
    printed = [{**asdict(row), "value": row.printed.partition(" ±")[0]} for row in rows]
    write_csv(folder / f"{FILE}.csv", printed, COLUMNS)
    write_text(folder / f"{FILE}.md", markdown(rows))


def markdown(rows: Sequence[PaperRow]) -> str:
    """Return rows as Markdown, a table for each table and status of a paper."""
    if not rows:
        return "No paper's numbers are of these tasks and defenses.\n"
    groups: dict[tuple[str, str, str, str], list[PaperRow]] = {}
    for row in rows:
        groups.setdefault((row.paper, row.table, row.status, row.source), []).append(row)
    parts = ["# Papers' numbers\n", f"{LEGEND}\n"]
    for (paper, table, status, source), group in groups.items():
        parts.append(f"### {paper}, table {table} ({status}): {source}\n")
        parts.append("| " + " | ".join(SHOWN) + " |")
        parts.append("|" + " --- |" * len(SHOWN))
        for row in group:
            parts.append("| " + " | ".join(str(getattr(row, name)).replace("|", "\\|") for name in SHOWN) + " |")
        parts.append("")
    return "\n".join(parts)
