"""The contract of a task: the grid of a suite, what is measured in it, and the tables made from it.

A task is one file: a class with the form of its entry in the suite (`Spec`) above it, registered by a decorator. The
entry under `tasks` names it by `kind` (default: immunization)::

    tasks:
      styles: {targets: [...], innocents: [...]}      # kind: immunization
      copies: {kind: memorization, prompts: [...]}

`plan` adds stages through a builder and yields measurements: which stage is observed, which stages score it, and which
labels the values have in the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from harness.contracts.defense import Defense
from harness.contracts.method import Method
from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Section, Table
from harness.core.concept import Concept
from harness.core.identity import Input, Stage
from harness.core.sampling import Sampling
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import TaskSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

FILLED = frozenset(
    {"suite", "model", "step", "prompt_index", "prompt", "metric", "value", "direction", "unit", "range", "backbone",
     "preprocessing", "library", "sample_key", "score_key"}
)  # fmt: skip
"""Columns that rows fill from the stages and their scores: no measurement may use them as labels."""
Label = str | int | bool | tuple[str, ...]
"""A value of a label; a tuple is joined by + in the rows."""


@dataclass(slots=True)  # not frozen: see Stage
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
    """Kind -> key of further stages that must be committed before there are rows."""
    is_apart: bool = False
    """Whether a script for this measurement alone would do everything for it itself."""


class Build(Protocol):
    """The builder that a task plans with: it adds stages to one plan and returns their keys. Equal stages are one."""

    loaded: LoadedSuite
    sampling: Sampling
    """How the suite draws images."""

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

    def images(self, name: str) -> str:
        """Add the stage that lays out the images of a concept of the suite, one folder per split."""

    def release(
        self,
        kind: str,
        defense: Defense,
        called: str,
        targets: Sequence[str],
        preserve: Sequence[str],
        seed: int,
        over: ModelState,
    ) -> str:
        """Add a stage in which a defense works on a state of the model, as eraser or immunizer (`kind`)."""

    def sample(
        self, concept: Concept, seed: int, steps: tuple[int, ...], inputs: Mapping[str, Input], label: str
    ) -> str:
        """Add a stage that draws the evaluation images of a concept."""

    def scores(self, concept: Concept, generated: Mapping[str, Input], label: str) -> dict[str, str]:
        """Add the stages that score images against the references of a concept; return metric -> key."""


class Task(Method):
    """Base class of tasks. Subclasses set the class attributes and write `plan`."""

    Spec: ClassVar[type[TaskSpec]]
    """The form of its entry in a suite."""
    sections: ClassVar[frozenset[str]] = frozenset()
    """The sections of a suite that it needs: any of defenses, attacks, metrics and utility."""
    may_use: ClassVar[frozenset[str]] = frozenset()
    """Further sections that it uses where a suite has them."""

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, Any]) -> Iterable[Mistake]:
        """Return mistakes in the entries of this kind, before images are read; malformed entries are not passed."""
        return ()

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, Any]) -> Iterable[Mistake]:
        """Return mistakes in the entries, once their concepts are resolved."""
        return ()

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: Any) -> int:
        """Return about how many trials an entry has, so that a mistyped size is refused before planning."""
        return 0

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterable[Table | Figure]:
        """Return the tables and figures of a run, the main table first; `rows`: of all entries of this kind."""
        return ()

    def shown(self, made: Sequence[Table | Figure]) -> Sequence[Section]:
        """Return the sections of its tables that a terminal shows; by default all."""
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
