"""Write and show the tables of an opened suite, or check whether they exist already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.commands import arguments
from harness.commands.opened import Opened
from harness.core.counted import counted
from harness.core.files import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from harness.results.tables import Written


def write_tables(opened: Opened, papers: Sequence[Any] = ()) -> Written:
    """Write the tables of the committed stages."""
    from harness.results import tables

    if opened.store.url is not None:
        _bring_scores(opened)
    folder, model = opened.folder, opened.source.name
    return tables.write(opened.plan, opened.store, folder, model, opened.gates, papers, arguments.warn)


def _bring_scores(opened: Opened) -> None:
    """Bring the scores of the plan from the objects of its store, many at once; the rows ask for one after another."""
    committed = opened.committed()  # others may have pushed since it was listed
    scores = dict.fromkeys(key for each in opened.plan.measurements for key in each.scores.values())
    wanted = [(opened.plan.stages[key].kind, key) for key in scores if key in committed]
    missing = [stage for stage in wanted if not opened.store.is_here(*stage)]
    if missing:
        arguments.note([f"fetching {counted(len(missing), 'score')} from {opened.store.url}"])
        opened.store.bring_all(missing)


def are_written(opened: Opened) -> bool:
    """Return whether the folder contains the tables of this plan, with every row."""
    from harness.results import tables

    return tables.are_written(opened.plan, opened.folder, opened.source.name, opened.gates)


def finish(opened: Opened, console: Console) -> None:
    """Write the tables and show them."""
    show(opened, write_tables(opened), console)


def show(opened: Opened, written: Written, console: Console) -> None:
    """Show the written tables in the terminal, and print their location."""
    from harness.results import console as terminal

    terminal.show(written.shown, console, before_note="  ")
    console.print(f"written: {opened.folder}/{written.files[0]} and more", highlight=False, soft_wrap=True)


def write_resolved(opened: Opened) -> None:
    """Write the resolved suite, including defaults and overrides."""
    from harness.suite import resolved

    write_text(opened.folder / resolved.RESOLVED, resolved.text(opened.loaded, opened.folder, opened.plugins))
