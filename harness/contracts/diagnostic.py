"""The contract of a diagnostic: a method's own tables of a run, beside the tables that all methods share.

A diagnostic belongs to a method and is kept in the method's package, or in a plug-in. The tables and the report call
every registered diagnostic and know none by name. One that raises is left out and named in the output; all other tables
are written. A small one::

    @register("diagnostic")
    class ChangedWeights(Diagnostic):
        name = "changed_weights"
        version = 1
        title = "Changed weights"
        definitions = (Definition("changed", "changed", "", "How many tensors the defense changed.", "ours"),)

        def of(self, run):
            return [{"defense": m.defense, "changed": count(m.folder)} for m in run.released()] or None

        def files(self, found, run):
            yield Table("changed_weights", ("defense", "changed"), found)

Modules of diagnostics are imported with the methods, so they import torch, pandas and matplotlib inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from harness.contracts.method import Method
from harness.contracts.table import Figure, Table

if TYPE_CHECKING:
    from harness.analysis.definitions import Definition
    from harness.analysis.measurements import Measurements
    from harness.analysis.paper_rows import PaperRow
    from harness.core.identity import Stage
    from harness.store.store import Store
    from harness.suite.spec import Suite


@dataclass(frozen=True)
class ReleasedModel:
    """A model that a defense released in a run: its labels, and the committed stage that made it."""

    task: str
    defense: str
    method: str
    profile: str
    protected: tuple[str, ...]
    """The concepts that were protected together."""
    seed: int
    is_weak: bool
    """Whether the suite made the defense weak on purpose."""
    key: str
    """Of the stage; the same for all seeds where no seed changes the result."""
    stage: Stage
    folder: Path
    """Contains the protection, and the files that `Defense.keep` wrote beside it."""


class MeasuredRun(Protocol):
    """A run for a diagnostic: what was planned, what is committed, and the general numbers computed from it."""

    @property
    def suite(self) -> str:
        """The suite's name."""

    @property
    def model_name(self) -> str:
        """The model that everything starts from."""

    @property
    def folder(self) -> Path:
        """The folder of the run's tables."""

    @property
    def store(self) -> Store:
        """Where stages are committed."""

    @property
    def measurements(self) -> Measurements:
        """The rows."""

    @property
    def leaderboard(self) -> Sequence[Mapping[str, Any]]:
        """The lines of leaderboard.csv."""

    @property
    def costs(self) -> Sequence[Mapping[str, Any]]:
        """The lines of adaptation_cost.csv."""

    @property
    def papers(self) -> Sequence[PaperRow]:
        """Papers' numbers that are wanted beside the run's; empty where they were not asked for."""

    @property
    def protected_together(self) -> Mapping[str, int]:
        """How many concepts the largest protected set of each task holds."""

    @property
    def erasing_tasks(self) -> frozenset[str]:
        """The tasks that begin with an erasure."""

    @property
    def origin(self) -> str:
        """A sentence on program, packages, devices and days of the adaptations; "" where none is done."""

    def released(self) -> Iterable[ReleasedModel]:
        """Yield every released model that is committed, once, in the order of the plan."""


@dataclass(frozen=True)
class PageSection:
    """A section of the report, below a heading that the page makes."""

    title: str
    anchor: str
    """Of links to it: lower-case letters, digits and "-"; unique on the page."""
    template: str
    """A Jinja template as text. Values are escaped; the page's filters number, percent, duration and plain are known.
    Figures are in `figures/`, data files in `data/`."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """The template's variables."""
    figures: tuple[str, ...] = ()
    """Files of the run folder that the section shows; they are copied into the report's `figures/`."""
    data: tuple[str, ...] = ()
    """Files of the run folder that the report offers; they are copied into its `data/`."""


class Diagnostic(Method):
    """Base class of diagnostics. Subclasses set `name` and `version`, write `of`, and other functions as needed."""

    title: ClassVar[str] = ""
    """Of the section that holds its definitions."""
    definitions: ClassVar[tuple[Definition, ...]] = ()
    """What the columns of its tables mean, one definition for each column that the general tables do not have."""

    def of(self, run: MeasuredRun) -> Any | None:
        """Return the results on a run, which the other functions receive as `found`; None: none on this run."""
        raise NotImplementedError

    def files(self, found: Any, run: MeasuredRun) -> Iterable[Table | Figure]:
        """Return its tables and figures, under names that no other table or figure of the run has."""
        return ()

    def extend(self, table: Table, found: Any, run: MeasuredRun) -> Table:
        """Return a general table with further columns or sections; lines and general columns stay."""
        return table

    def stands_beside(self, row: PaperRow, suite: Suite) -> bool | None:
        """Return whether a paper's row belongs beside a suite's results; None: the general rule decides.

        The general rule takes rows of the suite's kinds of tasks and of the defenses that it measures.
        """
        return None

    def section(self, folder: Path) -> PageSection | None:
        """Return its section of the report, from the files of a run folder; None: the report has none."""
        return None
