"""Diagnostic of frozen tensors: masks and their overlaps, masks against random ones, and FreezeAsGuard's tables.

Files: masks.csv, .md and .png; masks_against_random.csv and .png; freezing.csv and .md. If papers' numbers are
requested, FreezeAsGuard's are added to freezing.csv and .md and to the costs in adaptation_cost.csv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defenses.freezing import against_random, collect, masks, section, tables
from defenses.freezing.definitions import DEFINITIONS
from defenses.freezing.masks import Mask
from harness.contracts.diagnostic import Diagnostic, MeasuredRun, PageSection
from harness.contracts.table import Figure, Table
from harness.core.registry import register

if TYPE_CHECKING:
    from harness.analysis.paper_rows import PaperRow
    from harness.suite.spec import Suite


@dataclass(frozen=True)
class Found:
    """The results on frozen tensors of a run."""

    masks: Sequence[Mask]
    overlaps: Sequence[dict[str, Any]]
    """Lines of masks.csv."""
    against: Sequence[dict[str, Any]]
    """Lines of masks_against_random.csv."""
    reached: Sequence[dict[str, Any]]
    """Lines of freezing.csv."""
    names: Mapping[tuple[str, str], tables.Name]
    """(task, defense) -> its name in the paper."""


@register("diagnostic")
class FreezingDiagnostic(Diagnostic):
    """Masks of freezing defenses: whether they agree, whether they beat random masks, and the cost they save."""

    name = "freezing"
    version = 1
    title = "Frozen tensors"
    definitions = DEFINITIONS

    def of(self, run: MeasuredRun) -> Found | None:
        """Return the results on the masks of the run; None if no defense has a mask."""
        found = collect.of_run(run)
        if not found:
            return None
        reached = tables.lines(run.leaderboard, found, run.protected_together, run.measurements)
        return Found(
            masks=found,
            overlaps=masks.table(found),
            against=against_random.lines(found, run.measurements),
            reached=reached,
            names=tables.paper_names(reached, found, run.erasing_tasks),
        )

    def files(self, found: Found, run: MeasuredRun) -> Iterator[Table | Figure]:
        """Yield the tables and figures that the module's docstring names."""
        from defenses.freezing import against_random_figure, mask_figure

        agreement = against_random.sections(found.overlaps, found.against)
        yield Table("masks", masks.COLUMNS, found.overlaps, agreement)
        yield Table("masks_against_random", against_random.columns(), found.against)
        yield Figure("masks", lambda path: mask_figure.draw(found.masks, path))
        yield Figure(
            "masks_against_random", lambda path: against_random_figure.draw(found.overlaps, found.against, path)
        )
        order = list(dict.fromkeys(name for known in run.measurements.defenses.values() for name in known))
        pages = tables.sections(found.reached, run.costs, order, run.papers, found.names, run.origin)
        columns, reached = tables.COLUMNS, found.reached
        if run.papers:
            columns += tuple(tables.PAPER_COLUMNS)
            reached = tables.beside_paper(reached, run.papers, found.names)
        yield Table("freezing", columns, reached, pages)

    def extend(self, table: Table, found: Found, run: MeasuredRun) -> Table:
        """Add the paper's costs to the measured ones, if papers' numbers are requested."""
        if table.name != "adaptation_cost" or not run.papers:
            return table
        lines = tables.costs_beside_paper(table.lines, found.reached, run.papers, found.names)
        return replace(table, columns=table.columns + tuple(tables.PAPER_COST_COLUMNS), lines=lines)

    def belongs_beside(self, row: PaperRow, suite: Suite) -> bool | None:
        """Return whether a row of FreezeAsGuard's paper belongs beside a suite that freezes; None for other rows.

        Its tables are on adaptation, with or without earlier erasure. Its IMMA corresponds to `joint`, which is IMMA on
        several concepts, and its UCE to `none` in a task that erases.
        """
        defenses = {spec.method for spec in suite.defenses} | {""}
        if row.paper != tables.PAPER or not defenses & set(tables.METHODS):
            return None
        erases = any(task.erase for task in suite.tasks.values())
        kinds = {"adaptation"} | ({"relearning"} if erases else set())
        if any(not task.erase for task in suite.tasks.values()):
            kinds.add("personalization")
        defenses |= ({"imma"} if "joint" in defenses else set()) | ({"uce"} if erases else set())
        return row.task in kinds and row.defense in defenses

    def section(self, folder: Path) -> PageSection | None:
        """Return the section on frozen tensors; None if nothing was frozen."""
        return section.of_run(folder)
