"""Papers' numbers for comparison with a run, for the same tasks and defenses; never mixed with the run's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from harness.analysis.paper_rows import COLUMNS, PaperRow, load
from harness.contracts.table import Section, Table
from harness.results.diagnostics import Diagnostics
from harness.results.writing import write_table
from harness.suite.spec import DEFAULT_TASK, Suite

FILE = "paper_rows"
SHOWN = ("model", "task", "defense", "attack", "setting", "metric", "unit", "printed", "note")
LEGEND = (
    "As printed: models, data, budgets, encoders and prompts are the papers' own, so a number here is not comparable "
    "with one of the leaderboard. second-hand: another document quotes the paper; third-party: "
    "others measured it; figure: read off a plot."
)


def beside(suite: Suite, say: Callable[[str], None] | None = None) -> list[PaperRow]:
    """Return the rows of papers that match a suite: its kinds of tasks, its defenses, and real images.

    A diagnostic may decide differently for the rows of its paper. `say` gets a line for each diagnostic that raised.
    """
    immunized = [task for task in suite.tasks.values() if task.kind == DEFAULT_TASK]  # papers have no other kind
    tasks = {"relearning"} if any(task.erase for task in immunized) else set()
    if any(not task.erase for task in immunized):
        tasks |= {"personalization", "adaptation"}
    defenses = {spec.method for spec in suite.defenses} | {""}
    diagnostics = Diagnostics(say)

    def belongs_beside(row: PaperRow) -> bool:
        opinions = [opinion for _, opinion in diagnostics.ask(lambda known: known.belongs_beside(row, suite))]
        return any(opinions) if opinions else row.task in tasks and row.defense in defenses

    return [row for row in load() if belongs_beside(row)]


def write(rows: Sequence[PaperRow], folder: Path) -> None:
    """Write paper_rows.csv and .md into a run's folder."""
    printed = [{**asdict(row), "value": row.printed.partition(" ±")[0]} for row in rows]
    write_table(Table(FILE, COLUMNS, printed, sections(rows)), folder)


def sections(rows: Sequence[PaperRow]) -> list[Section]:
    """Return one table for each table and status of a paper."""
    if not rows:
        return [Section(text=("No paper's numbers are of these tasks and defenses.",))]
    groups: dict[tuple[str, str, str, str], list[PaperRow]] = {}
    for row in rows:
        groups.setdefault((row.paper, row.table, row.status, row.source), []).append(row)
    found = [Section("Papers' numbers", (LEGEND,), level=1)]
    for (paper, table, status, source), group in groups.items():
        title = f"{paper}, table {table} ({status}): {source}"
        cells = [[str(getattr(row, name)) for name in SHOWN] for row in group]
        found.append(Section(title, headers=SHOWN, rows=cells, alignments="l" * len(SHOWN), level=3))
    return found
