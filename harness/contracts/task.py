"""The contract of a task: the grid of a suite, what is measured in it, and its tables.

A task is one file: a class with the form of its entry in the suite (`Spec`) above it, registered by a decorator. The
entry under `tasks` names it by `kind` (default: immunization)::

    tasks:
      styles: {targets: [...], innocents: [...]}      # kind: immunization
      copies: {kind: memorization, prompts: [...]}

`plan` describes stages through a builder and yields measurements: which stage is observed, which stages score it, and
which labels the values have in the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from harness.contracts.method import Method
from harness.contracts.table import Figure, Section, Table
from harness.core.identity import Input, Stage
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import TaskSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

Label = str | int | bool | tuple[str, ...]
"""A value of a label; a tuple is joined by + in the rows."""


@dataclass(frozen=True)
class Measurement:
    """One row group of the table: the stages of its images and scores, and its labels."""

    labels: Mapping[str, Label]
    """The columns that name the group: task, defense, concept, seed, ..."""
    observed: str
    """Key of the stage whose output is scored."""
    scores: Mapping[str, str]
    """Metric label -> key of the stage that wrote its scores."""
    steps: tuple[int, ...] = (0,)
    """Training steps at which the output is read; 0: before any."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Kind -> key of further stages without which there are no rows, even where all of the above are committed."""
    is_apart: bool = False
    """Whether a script for this measurement only would repeat all of its stages."""


class Build(Protocol):
    """The builder that a task plans with: it adds stages to one plan and returns their keys. Equal stages are one."""

    loaded: LoadedSuite

    def stage(
        self,
        kind: str,
        parameters: Any,
        *,
        inputs: Mapping[str, Input],
        label: str,
        seed: int | None = None,
        **further: Any,
    ) -> str:
        """Add a stage; see `harness.plan.builder.Builder.stage` for further arguments."""

    def unit(self, name: str, stages: Iterable[str]) -> None:
        """Group stages that one worker does in a row; a stage belongs to the first unit that names it."""

    def read(self, key: str) -> Input:
        """Return a planned stage as the input of another."""


class Task(Method):
    """Base class of tasks. Subclasses set the class attributes and write `plan`."""

    Spec: ClassVar[type[TaskSpec]]
    """The form of its entry in a suite."""
    sections: ClassVar[frozenset[str]] = frozenset()
    """The sections of a suite that it needs, of defenses, attacks, metrics and utility."""

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, Any]) -> Iterable[Mistake]:
        """Return what is wrong with the entries of this kind, before images are read; a wrong entry is not in them."""
        return ()

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, Any]) -> Iterable[Mistake]:
        """Return what is wrong with the entries, once their concepts are resolved."""
        return ()

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: Any) -> int:
        """Return about how many trials an entry has: a typing error is refused before it is planned."""
        return 0

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterable[Table | Figure]:
        """Return the tables and figures of a run, the main table first; `rows`: of all entries of this kind."""
        return ()

    def shown(self, made: Sequence[Table | Figure]) -> Sequence[Section]:
        """Return the sections that a terminal shows; unless overridden, all sections of the tables."""
        return [section for table in made if isinstance(table, Table) for section in table.sections]

    def plan(self, name: str, spec: Any, build: Any) -> Iterator[Measurement]:
        """Yield the measurements of one entry, in the order of the table, adding their stages to the plan."""
        raise NotImplementedError


def entries_by_kind(tasks: Mapping[str, TaskSpec]) -> dict[str, dict[str, TaskSpec]]:
    """Return kind of task -> its entries, both in the order of the suite."""
    found: dict[str, dict[str, TaskSpec]] = {}
    for name, spec in tasks.items():
        found.setdefault(spec.kind, {})[name] = spec
    return found


__all__ = ["Build", "Input", "Label", "Measurement", "Stage", "Task", "TaskSpec", "entries_by_kind"]
