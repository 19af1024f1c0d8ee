"""Tables of a run, written from committed stages.

Always: rows.csv and rows.parquet, and the tables and figures of the suite's tasks. If there are adaptations:
adaptation_cost.csv and .md. Then the files of the registered diagnostics.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from harness.analysis.leaderboard import Gates
from harness.analysis.paper_rows import PaperRow
from harness.contracts.diagnostic import Diagnostic
from harness.contracts.table import Figure, Section, Table
from harness.core import registry
from harness.core.errors import one_line
from harness.core.files import write_json
from harness.core.identity import digest_of_json
from harness.plan.graph import Plan
from harness.results import adaptation_cost
from harness.results.diagnostics import Diagnostics
from harness.results.measured import RunResults
from harness.results.rows import FILES as ROW_FILES
from harness.results.rows import collect, write_rows
from harness.results.writing import draw_figure, files_of, write_table
from harness.store.store import Store

STATE = "tables.json"
"""The file that records what the folder's tables were made from, the written files, and failed diagnostics."""
FAILURES = "failures"
"""The folder of the records of stages that failed: KIND-KEY.json."""
VERSION = 16
"""Increased when the same rows give different tables or figures."""
RESERVED = frozenset({"paper_rows", "report"})
"""Names that tables of a run may not have."""
_NAME = re.compile(r"[a-z0-9_]{1,60}")
_FILE = re.compile(r"[a-z0-9_]{1,60}\.(csv|md|png)")


@dataclass(frozen=True)
class Written:
    """The written tables of a run."""

    shown: list[Section]
    """Sections for the terminal."""
    files: list[str]
    """Names of the files in the run's folder; the first is the main table's."""


def write(
    plan: Plan,
    store: Store,
    folder: Path,
    model_name: str,
    gates: Gates,
    papers: Sequence[PaperRow] = (),
    say: Callable[[str], None] | None = None,
) -> Written:
    """Write the tables of a run from committed stages.

    `papers` are numbers that diagnostics may show for comparison. `say` gets a line for each diagnostic that failed and
    each damaged stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = collect(plan, store, model_name, say)
    is_whole = all(store.has(plan.stages[k].kind, k) for each in plan.measurements for k in each.scores.values())
    run = RunResults(plan, store, folder, model_name, gates, rows, papers)
    with ThreadPoolExecutor(1) as beside:  # write rows (mostly outside Python) while the tables are made
        written = beside.submit(write_rows, folder, rows)
        made, shown = _of_tasks(run)
    written.result()
    if run.costs:
        made.append(adaptation_cost.table(run.costs))
    general = [each for each in made if isinstance(each, Table)]
    files = [name for each in made for name in _write(each, folder)] + list(ROW_FILES)
    diagnostics = Diagnostics(say)
    files += _write_own(diagnostics, run, general, {Path(name).stem for name in files} | RESERVED)
    _remove_old(folder, files)
    failed = {name: asdict(failure) for name, failure in diagnostics.failures.items()}
    state = {
        "of": _fingerprint(plan, model_name, gates),
        "is_whole": is_whole,
        "files": files,
        "failed": failed,
        "others": _failures_of_others(plan, folder),
    }
    write_json(folder / STATE, state)
    return Written(shown, files)


def _failures_of_others(plan: Plan, folder: Path) -> list[str]:
    """Return the names of recorded failures of stages that this plan does not have, such as those of a larger grid.

    They are kept: the larger grid may be asked about again. Readers of the folder leave them out.
    """
    names = [file.stem for file in (folder / FAILURES).glob("*.json")]
    return sorted(name for name in names if name.rpartition("-")[2] not in plan.stages)


def _of_tasks(run: RunResults) -> tuple[list[Table | Figure], list[Section]]:
    """Return the tables and figures of each kind of task in the suite, and their sections for the terminal."""
    made: list[Table | Figure] = []
    shown: list[Section] = []
    for kind in dict.fromkeys(run.plan.tasks.values()):
        cls, rows = registry.get("task", kind), run.rows_of(kind)
        with registry.blamed(cls, f"the tables of task '{kind}' failed; its rows are in {one_line(run.folder)}"):
            task = cls(None)
            own = list(task.tables(run, rows))
            taken = RESERVED | {Path(name).stem for name in ROW_FILES} | {each.name for each in made}
            for each in own:
                if not _NAME.fullmatch(each.name) or each.name in taken:
                    raise ValueError(f"the name '{one_line(each.name, 80)}' of a table is bad, or taken")
                taken |= {each.name}
            made += own
            shown += task.shown(own)
    return made, shown


def _write(made: Table | Figure, folder: Path) -> list[str]:
    """Write a table or a figure; return the names of its files, none for an empty figure."""
    if isinstance(made, Table):
        write_table(made, folder)
    elif not draw_figure(made, folder):
        return []
    return files_of(made)


def _write_own(
    diagnostics: Diagnostics, run: RunResults, general: Sequence[Table], reserved: Collection[str]
) -> list[str]:
    """Write the files of the diagnostics, and their additions to general tables; return the names of the files."""
    found = diagnostics.ask(lambda diagnostic: diagnostic.of(run))
    written: dict[str, list[str]] = {}
    tables = list(general)
    for diagnostic, own in found:
        taken = {*reserved} | {Path(name).stem for names in written.values() for name in names}
        files = written.setdefault(diagnostic.name, [])
        diagnostics.attempt(diagnostic.name, partial(_write_files, diagnostic, own, run, taken, files), None)
        tables = diagnostics.attempt(diagnostic.name, partial(_write_extended, diagnostic, own, run, tables), tables)
        if diagnostic.name in diagnostics.failures:
            for file in written.pop(diagnostic.name):
                (run.folder / file).unlink(missing_ok=True)
            for table in tables:  # restore the tables: the diagnostic may have written some
                write_table(table, run.folder)
    return [file for files in written.values() for file in files]


def _write_files(
    diagnostic: Diagnostic, found: Any, run: RunResults, taken: Iterable[str], files: list[str]
) -> None:
    """Write a diagnostic's tables and figures; put the names of their files into `files`.

    Raises ValueError for a name that is invalid or already used.
    """
    for each in list(diagnostic.files(found, run)):  # make all before writing the first
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
    """Write the general tables that a diagnostic extends; return all general tables, with its additions."""
    extended = [_with_more(table, diagnostic.extend(table, found, run)) for table in tables]
    for table, with_more in zip(tables, extended, strict=True):
        if with_more is not table:
            write_table(with_more, run.folder)
    return extended


def _with_more(table: Table, extended: Table) -> Table:
    """Return a table with the additions. Raises ValueError if the extended table is not the same table."""
    if extended is table:
        return table
    is_same = extended.name == table.name and extended.columns[: len(table.columns)] == table.columns
    if not is_same or len(extended.lines) != len(table.lines):
        raise ValueError(f"{table.name}: a diagnostic adds columns behind the general ones, and keeps name and lines")
    # a diagnostic cannot change the general tables' numbers
    return replace(extended, lines=[{**new, **old} for old, new in zip(table.lines, extended.lines, strict=True)])


def _remove_old(folder: Path, written: Sequence[str]) -> None:
    """Remove files of diagnostics or costs from the last writing that were not written again."""
    for name in _state(folder).get("files", ()):
        if isinstance(name, str) and _FILE.fullmatch(name) and name not in written:
            (folder / name).unlink(missing_ok=True)


def are_written(plan: Plan, folder: Path, model_name: str, gates: Gates) -> bool:
    """Return whether the folder's tables match this plan and these gates, with every row and diagnostic."""
    state = _state(folder)
    files = state.get("files")
    if state.get("of") != _fingerprint(plan, model_name, gates) or state.get("is_whole") is not True:
        return False
    if state.get("failed") != {} or not isinstance(files, list):
        return False
    return all((folder / str(name)).is_file() for name in files)


def files(folder: Path) -> list[str]:
    """Return the names of the folder's table files, as recorded in STATE."""
    listed = _state(folder).get("files")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def failures(folder: Path) -> list[tuple[str, str]]:
    """Return (diagnostic, error) of the diagnostics that failed when the folder's tables were written."""
    failed = _state(folder).get("failed")
    if not isinstance(failed, dict):
        return []
    return [(str(name), str(each.get("error") if isinstance(each, dict) else each)) for name, each in failed.items()]


def others(folder: Path) -> frozenset[str]:
    """Return the names of recorded failures that are not those of the run that the tables show."""
    listed = _state(folder).get("others")
    return frozenset(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else frozenset()


def _state(folder: Path) -> dict[str, Any]:
    """Return the content of STATE; {} if it is missing or damaged."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _fingerprint(plan: Plan, model_name: str, gates: Gates) -> str:
    """Return a digest of all inputs of the tables; score keys stand for the scores' values."""
    diagnostics = [registry.component(registry.get("diagnostic", name)) for name in registry.names("diagnostic")]
    tasks = {name: registry.component(registry.get("task", kind)) for name, kind in plan.tasks.items()}
    measured = [
        [dict(m.labels), m.observed, dict(m.scores), m.steps, dict(m.needs), m.is_apart] for m in plan.measurements
    ]
    return digest_of_json([VERSION, plan.suite, model_name, asdict(gates), tasks, measured, diagnostics])
