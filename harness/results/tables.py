"""Tables of a run, written from what is committed.

Always: rows.csv, leaderboard.csv and .md, worst_case.csv, curves.csv, concepts.csv and .md, recovery_*.png. Where
something was adapted: adaptation_cost.csv and .md. Then whatever the registered diagnostics have to say of the run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.analysis.curves import COLUMNS as CURVE_COLUMNS
from harness.analysis.curves import curves
from harness.analysis.leaderboard import COLUMNS, CONCEPT_COLUMNS, Gates, by_concept, leaderboard, worst_case
from harness.analysis.measurements import Measurements
from harness.analysis.paper_rows import PaperRow
from harness.contracts.diagnostic import Diagnostic
from harness.contracts.table import Table
from harness.core import registry
from harness.core.files import write_json
from harness.core.identity import digest_of_json
from harness.plan.graph import Plan
from harness.results import adaptation_cost
from harness.results.diagnostics import Diagnostics
from harness.results.figures import recovery_curves
from harness.results.leaderboard import concept_sections, sections
from harness.results.measured import RunResults
from harness.results.rows import COLUMNS as ROW_COLUMNS
from harness.results.rows import collect, write_through
from harness.results.writing import draw_figure, files_of, write_table
from harness.store.store import Store

STATE = "tables.json"
"""What the tables in a folder were made from, which files the diagnostics wrote, and which of them failed."""
VERSION = 12
"""Raised when the same rows make other tables or figures."""
FILES = (
    "rows.csv", "leaderboard.csv", "leaderboard.md", "worst_case.csv", "curves.csv", "concepts.csv", "concepts.md",
    "recovery_target.png",
)  # fmt: skip
"""Of every run."""
_TAKEN = {"rows", "leaderboard", "worst_case", "curves", "concepts", "recovery_target", "recovery_innocent",
          "adaptation_cost", "paper_rows"}  # fmt: skip
_NAME = re.compile(r"[a-z0-9_]{1,60}")
_FILE = re.compile(r"[a-z0-9_]{1,60}\.(csv|md|png)")


def write(
    plan: Plan,
    store: Store,
    folder: Path,
    model_name: str,
    gates: Gates,
    papers: Sequence[PaperRow] = (),
    say: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Write the tables of a run from what is committed; return the leaderboard's lines.

    `papers` are numbers that diagnostics may set beside their own. `say` gets a line for each diagnostic that failed.
    """
    is_whole = all(store.has(plan.stages[k].kind, k) for each in plan.measurements for k in each.scores.values())
    folder.mkdir(parents=True, exist_ok=True)
    table = Measurements(write_through(folder / "rows.csv", collect(plan, store, model_name), ROW_COLUMNS))
    lines = leaderboard(table, gates)
    done = adaptation_cost.records(plan, store)
    costs = adaptation_cost.lines(plan, done)
    general = _general(table, lines, costs)
    for made in general:
        write_table(made, folder)
    for role in ("target", "innocent"):
        recovery_curves(table, folder / f"recovery_{role}.png", role)
    run = RunResults(plan, store, folder, model_name, table, lines, done, costs, papers)
    diagnostics = Diagnostics(say)
    written = [*(files_of(general[-1]) if costs else ()), *_write_own(diagnostics, run, general)]
    _remove_old(folder, written)
    failed = {name: asdict(failure) for name, failure in diagnostics.failures.items()}
    state = {"of": _fingerprint(plan, model_name, gates), "is_whole": is_whole, "files": written, "failed": failed}
    write_json(folder / STATE, state)
    return lines


def _general(
    table: Measurements, lines: list[dict[str, Any]], costs: Sequence[Mapping[str, Any]]
) -> list[Table]:
    """Return the tables that every method shares; that of costs comes last, and only where something was adapted."""
    worst, soon, concepts = worst_case(lines), curves(table), by_concept(table)
    return [
        Table("leaderboard", COLUMNS, lines, sections(lines, worst, soon)),
        Table("worst_case", COLUMNS, worst),
        Table("curves", CURVE_COLUMNS, soon),
        Table("concepts", CONCEPT_COLUMNS, concepts, concept_sections(concepts)),
        *([adaptation_cost.table(costs)] if costs else []),
    ]


def _write_own(diagnostics: Diagnostics, run: RunResults, general: Sequence[Table]) -> list[str]:
    """Write what the diagnostics have to say, and what they add to general tables; return the names of their files."""
    found = diagnostics.ask(lambda diagnostic: diagnostic.of(run))
    written: dict[str, list[str]] = {}
    tables = list(general)
    for diagnostic, own in found:
        taken = _TAKEN | {Path(name).stem for names in written.values() for name in names}
        files = written.setdefault(diagnostic.name, [])
        diagnostics.attempt(diagnostic.name, partial(_write_files, diagnostic, own, run, taken, files), None)
        tables = diagnostics.attempt(diagnostic.name, partial(_write_extended, diagnostic, own, run, tables), tables)
        if diagnostic.name in diagnostics.failures:
            for file in written.pop(diagnostic.name):
                (run.folder / file).unlink(missing_ok=True)
            for table in tables:  # as they were: it may have failed after some of them
                write_table(table, run.folder)
    return [file for files in written.values() for file in files]


def _write_files(
    diagnostic: Diagnostic, found: Any, run: RunResults, taken: Iterable[str], files: list[str]
) -> None:
    """Write a diagnostic's tables and figures; put the names of their files into `files`.

    Raises ValueError for a name that is bad, or another's.
    """
    for each in list(diagnostic.files(found, run)):  # all are made before the first is written
        if not _NAME.fullmatch(each.name):
            raise ValueError(f"a table is named {each.name!r}; use lower-case letters, digits and '_', at most 60")
        own = files_of(each)
        if each.name in taken or set(own) & set(files):
            raise ValueError(f"the name '{each.name}' is taken by another table or figure")
        files += own
        if isinstance(each, Table):
            write_table(each, run.folder)
        elif not draw_figure(each, run.folder):
            files.remove(*own)


def _write_extended(diagnostic: Diagnostic, found: Any, run: RunResults, tables: Sequence[Table]) -> list[Table]:
    """Write the general tables to which a diagnostic adds something; return all of them, with what was added."""
    extended = [_with_more(table, diagnostic.extend(table, found, run)) for table in tables]
    for table, with_more in zip(tables, extended, strict=True):
        if with_more is not table:
            write_table(with_more, run.folder)
    return extended


def _with_more(table: Table, extended: Table) -> Table:
    """Return a table with what was added. Raises ValueError where it is not the same table any more."""
    if extended is table:
        return table
    is_same = extended.name == table.name and extended.columns[: len(table.columns)] == table.columns
    if not is_same or len(extended.lines) != len(table.lines):
        raise ValueError(f"{table.name}: a diagnostic adds columns behind the general ones, and keeps name and lines")
    # general numbers are the general tables': a diagnostic changes none
    return replace(extended, lines=[{**new, **old} for old, new in zip(table.lines, extended.lines, strict=True)])


def _remove_old(folder: Path, written: Sequence[str]) -> None:
    """Remove files that diagnostics, or costs, left in the folder when it was last written, and that are none now."""
    for name in _state(folder).get("files", ()):
        if isinstance(name, str) and _FILE.fullmatch(name) and name not in (*written, *FILES):
            (folder / name).unlink(missing_ok=True)


def are_written(plan: Plan, folder: Path, model_name: str, gates: Gates) -> bool:
    """Tell whether the folder's tables are those of this plan and these gates, with every row and diagnostic."""
    state = _state(folder)
    files = state.get("files")
    if state.get("of") != _fingerprint(plan, model_name, gates) or state.get("is_whole") is not True:
        return False
    if state.get("failed") != {} or not isinstance(files, list):
        return False
    return all((folder / str(name)).is_file() for name in (*FILES, *files))


def failures(folder: Path) -> list[tuple[str, str]]:
    """Return (diagnostic, error) of those that failed when the folder's tables were written."""
    failed = _state(folder).get("failed")
    if not isinstance(failed, dict):
        return []
    return [(str(name), str(told.get("error") if isinstance(told, dict) else told)) for name, told in failed.items()]


def _state(folder: Path) -> dict[str, Any]:
    """Return what STATE holds; {} where there is none, or it is damaged."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _fingerprint(plan: Plan, model_name: str, gates: Gates) -> str:
    """Return a digest of everything that the tables are made from, but the values: those the score keys stand for."""
    diagnostics = [registry.component(registry.get("diagnostic", name)) for name in registry.names("diagnostic")]
    trials = [asdict(measurement) for measurement in plan.measurements]
    return digest_of_json([VERSION, plan.suite, model_name, asdict(gates), trials, diagnostics])
