"""Tables and figures as files of a run folder."""

from __future__ import annotations

from pathlib import Path

from harness.contracts.table import Figure, Table
from harness.core.files import write_text
from harness.results import markdown
from harness.results.rows import write_csv


def files_of(made: Table | Figure) -> list[str]:
    """Return the names of the files of a table or figure."""
    if isinstance(made, Figure):
        return [f"{made.name}.png"]
    return [f"{made.name}.csv"] * bool(made.columns) + [f"{made.name}.md"] * bool(made.sections)


def write_table(table: Table, folder: Path) -> None:
    """Write NAME.csv if the table has columns, and NAME.md if it has sections."""
    if table.columns:
        write_csv(folder / f"{table.name}.csv", table.lines, table.columns)
    if table.sections:
        write_text(folder / f"{table.name}.md", markdown.page(table.sections))


def draw_figure(figure: Figure, folder: Path) -> bool:
    """Write NAME.png; if there is nothing to draw, remove an old file and return False."""
    path = folder / f"{figure.name}.png"
    is_drawn = figure.draw(path)
    if not is_drawn:
        path.unlink(missing_ok=True)
    return is_drawn
