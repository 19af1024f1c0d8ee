"""The contract of a diagnostic: a method's own results of a run, in addition to the tables of all methods.

A diagnostic belongs to a method and is kept in the method's package, or in a plug-in. The tables and the report call
every registered diagnostic and know none by name. One that raises is left out and named in the output; all other tables
are written. A small example::

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
    from harness.analysis.claims import Claims
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
    """Key of the stage; the same for all seeds if the result does not depend on the seed."""
    stage: Stage
    store: Store

    @property
    def files(self) -> frozenset[str]:
        """The names of its files, from its record: with a store that machines share they may be elsewhere."""
        return frozenset(self.store.record("immunize", self.key)["contents"])

    @property
    def folder(self) -> Path:
        """Holds the protection, and the files of `Defense.keep`; brought here if it is elsewhere.

        Raises Damaged if it is not what was committed.
        """
        self.store.require_for_reading("immunize", self.key)
        return self.store.path("immunize", self.key)


class MeasuredRun(Protocol):
    """A run as a diagnostic sees it: the plan, the committed stages, and the general results computed from them."""

    @property
    def suite(self) -> str:
        """The suite's name."""

    @property
    def model_name(self) -> str:
        """The name of the base model."""

    @property
    def folder(self) -> Path:
        """The folder of the run's tables."""

    @property
    def store(self) -> Store:
        """The store of committed stages."""

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The planned stages, by key."""

    @property
    def measurements(self) -> Measurements:
        """The rows."""

    @property
    def leaderboard(self) -> Sequence[Mapping[str, Any]]:
        """The lines of leaderboard.csv."""

    @property
    def claims(self) -> Claims:
        """The leaderboard and the worst case with their ranks, and the headlines."""

    @property
    def costs(self) -> Sequence[Mapping[str, Any]]:
        """The lines of adaptation_cost.csv."""

    @property
    def papers(self) -> Sequence[PaperRow]:
        """Papers' numbers to show next to the run's; empty if not requested."""

    @property
    def protected_together(self) -> Mapping[str, int]:
        """How many concepts the largest protected set of each task holds."""

    @property
    def erasing_tasks(self) -> frozenset[str]:
        """The tasks that begin with an erasure."""

    @property
    def origin(self) -> str:
        """A sentence on program, packages, devices and days of the adaptations; "" if there are none yet."""

    def released(self) -> Iterable[ReleasedModel]:
        """Yield every released model that is committed, once, in the order of the plan."""


@dataclass(frozen=True)
class PageSection:
    """A section of the report, below a heading that the page adds."""

    title: str
    anchor: str
    """Target of links, unique in the page: lower-case letters, digits and "-"."""
    template: str
    """A Jinja template as text. Values are escaped; the page's filters number, percent, duration and plain can be used.
    Figures are in `figures/`, data files in `data/`."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """The template's variables."""
    figures: tuple[str, ...] = ()
    """Files of the run folder that the section shows; they are copied into the report's `figures/`."""
    data: tuple[str, ...] = ()
    """Files of the run folder that the report offers; they are copied into its `data/`."""


class Diagnostic(Method):
    """Base class of diagnostics. Subclasses set `name` and `version`, and write `of` and any other function here."""

    title: ClassVar[str] = ""
    """Title of the section with its definitions."""
    definitions: ClassVar[tuple[Definition, ...]] = ()
    """Definitions of those columns of its tables that the general tables do not have."""

    def of(self, run: MeasuredRun) -> Any | None:
        """Return its results on a run, which the other functions get as `found`; None: no results for this run."""
        raise NotImplementedError

    def files(self, found: Any, run: MeasuredRun) -> Iterable[Table | Figure]:
        """Return its tables and figures, under names that no other table or figure of the run has."""
        return ()

    def extend(self, table: Table, found: Any, run: MeasuredRun) -> Table:
        """Return a general table with further columns or sections; existing lines and columns must stay."""
        return table

    def belongs_beside(self, row: PaperRow, suite: Suite) -> bool | None:
        """Return whether a paper's row is shown next to a suite's results; None: the general rule decides.

        The general rule shows rows of the suite's kinds of tasks and of the defenses that it measures.
        """
        return None

    def section(self, folder: Path) -> PageSection | None:
        """Return its section of the report, made from the files of a run folder; None: no section."""
        return None
