"""What the report sections of tasks share: the paper that belongs beside a kind of task, limits, and read numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from harness.analysis.definitions import Definition
from harness.contracts.diagnostic import Diagnostic
from harness.results.reading import mean_of

if TYPE_CHECKING:
    from harness.analysis.paper_rows import PaperRow
    from harness.suite.spec import Suite


class TaskReport(Diagnostic):
    """The section of one kind of task, whose tables the task writes itself."""

    kind: ClassVar[str]
    """The kind of task."""
    paper: ClassVar[str]
    """The name of the file with papers' numbers."""

    def of(self, run: Any) -> None:
        """Return None: the task writes the tables."""
        return None

    def belongs_beside(self, row: PaperRow, suite: Suite) -> bool | None:
        """Return True for the paper's rows beside a suite with such a task; None for others."""
        has_task = any(task.kind == self.kind for task in suite.tasks.values())
        return True if has_task and row.paper == self.paper else None


def limits(name: str, title: str, covers: str, source: str) -> tuple[Definition, Definition]:
    """Return the definitions of the limits of an interval; `covers`: which chance is in it."""
    return tuple(
        Definition(
            f"{name}_{end}", f"{title}, {word} limit", "",
            f"{word.capitalize()} limit of the 95 % interval: {covers}. Empty for one seed.", source,
        )
        for end, word in (("low", "lower"), ("high", "upper"))
    )  # fmt: skip


def numbers(line: Mapping[str, str], *names: str) -> dict[str, Any]:
    """Return a line with some columns, and their limits, as numbers or None."""
    columns = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    return {**line, **{name: mean_of([line], name) for name in columns}}
