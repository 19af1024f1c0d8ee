"""Immunization: defenses before the release, adaptation after it, over a grid defense x attack x concept x seed.

The undefended model is a row like the others, measured under the same attack seed, so every gap is paired. An innocent
concept is adapted by the same attack as a target. Stages that vary least are planned first and shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

from harness.analysis.curves import COLUMNS as CURVE_COLUMNS
from harness.analysis.curves import curves
from harness.analysis.leaderboard import COLUMNS, CONCEPT_COLUMNS, FLOOR_COLUMNS, by_concept
from harness.contracts.defense import Defense
from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Section, Table
from harness.contracts.task import Measurement, Task
from harness.core import registry
from harness.core.registry import register
from harness.core.tuning import CHOSEN, PROPOSAL
from harness.plan.builder import Builder
from harness.results import floors, headline, leaderboard
from harness.results.figures import recovery_curves
from harness.suite.loaded import LoadedSuite, Mistake
from harness.tasks import immunization_checks, tuning, tuning_checks
from harness.tasks.grid import Grid, Released
from harness.tasks.immunization_form import ImmunizationSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun
    from harness.core.identity import Input

_STATED: Mapping[str, Input] = MappingProxyType({})
"""The setting of a defense that is not tuned: its parameters as the suite states them."""


@register("task")
class Immunization(Task):
    """Measure how badly released models can be adapted to targets, and how well to innocents."""

    name = "immunization"
    version = 1
    Spec = ImmunizationSpec
    sections = frozenset({"defenses", "attacks", "metrics", "utility"})
    may_use = frozenset({"tuning"})

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, ImmunizationSpec]) -> list[Mistake]:
        """Return mistakes in names, roles and methods that do not fit together."""
        return [*immunization_checks.before_concepts(loaded, entries), *tuning_checks.before_concepts(loaded, entries)]

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, ImmunizationSpec]) -> list[Mistake]:
        """Return mistakes in images and words: those that are missing, or seen by both sides."""
        return [*immunization_checks.after_concepts(loaded, entries), *tuning_checks.after_concepts(loaded, entries)]

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: ImmunizationSpec) -> int:
        """Return the number of attacked models and of models before any attack."""
        each = 1 + len(loaded.attacks_on(name))
        measured = sum((len(together) + len(spec.innocents)) * each for together in spec.targets)
        measured += len(loaded.suite.utility) * len(spec.targets)
        return measured * len(loaded.defenses_in(name)) * len(loaded.suite.seeds or ()) + tuning.count(loaded, name)

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
        """Yield the leaderboard, its worst case, how soon attacks recover, single concepts, and recovery curves."""
        found, measured = run.claims, run.measurements
        lines, worst, soon, concepts = found.lines, found.worst, curves(measured), by_concept(measured)
        short = headline.section(found.headlines, lines)
        by_floor = floors.sections(found)
        yield Table("leaderboard", COLUMNS, lines, leaderboard.sections(lines, worst, soon, short, by_floor))
        yield Table("worst_case", COLUMNS, worst)
        yield Table("worst_case_by_floor", FLOOR_COLUMNS, found.by_floor)
        yield Table("curves", CURVE_COLUMNS, soon)
        yield Table("concepts", CONCEPT_COLUMNS, concepts, leaderboard.concept_sections(concepts))
        yield Figure("utility_floors", partial(floors.draw, found))
        for role in ("target", "innocent"):
            yield Figure(f"recovery_{role}", partial(recovery_curves, measured, role=role))

    def shown(self, made: Sequence[Table | Figure]) -> list[Section]:
        """Return the sections of the leaderboard and of its worst case, then what is short."""
        main, worst = made[:2]
        short = next((section for section in main.sections if section.title == headline.TITLE), None)
        return leaderboard.shown(main.lines, worst.lines, short)

    def plan(self, name: str, spec: ImmunizationSpec, build: Builder) -> Iterator[Measurement]:
        """Yield the measurements, one protected set after the other."""
        searches: dict[tuple[int, int], Input] = {}
        for together in spec.targets:
            yield from _Grid(name, spec, tuple(together), build, searches).measurements()


class _Grid(Grid):
    """The measurements of one protected set: every defense, attack, concept and seed."""

    def __init__(
        self,
        task: str,
        spec: ImmunizationSpec,
        targets: tuple[str, ...],
        build: Builder,
        searches: dict[tuple[int, int], Input],
    ):
        """`searches`: (index, seed) of a tuned defense -> the choice of its setting, over all grids of the task."""
        super().__init__(task, targets, build)
        self.spec, self.searches = spec, searches
        self.roles = [(c, "target") for c in targets] + [(c, "innocent") for c in spec.innocents]
        self.utility = [(c, "utility") for c in build.suite.utility]
        self._made: dict[tuple[int, int], Released] = {}
        self._start = ModelState()

    def measurements(self) -> Iterator[Measurement]:
        """Yield them in the order of the table: real images, then per seed the model before erasure and defenses."""
        self._start = self.erased()
        for name, _ in self.roles:
            yield self.real(name)
        for name, _ in self.utility:
            yield self.floor(name, self.targets[0])
        for seed in self.build.suite.seeds:
            if self._start.layers:
                original = Released("original", "none", "", seed, ModelState(), f"original, seed {seed}")
                for name, role in [*self.roles, *self.utility]:
                    yield self.before(original, name, role)
            for index, _ in self.build.loaded.defenses_in(self.task):
                yield from self._defended(index, seed)

    def erased(self) -> ModelState:
        """Return the state that defenses start from: the base model, erased if the task erases."""
        if self.spec.erase is None:
            return ModelState()
        values = self.build.loaded.parameters["tasks", self.task, "erase"]
        eraser = registry.get("defense", self.spec.erase.method)(values)
        seed = self.build.suite.images.seed
        key = self._release("erase", eraser, self.spec.erase.name, self.targets, seed, ModelState())
        return ModelState().over("erase", key)

    def _release(
        self,
        kind: str,
        defense: Defense,
        called: str,
        targets: Sequence[str],
        seed: int,
        over: ModelState,
        setting: Mapping[str, Input] = _STATED,
    ) -> str:
        return self.build.release(kind, defense, called, targets, self.spec.preserve, seed, over, setting=setting)

    def tuned_on(self, defense: str, seed: int) -> Released:
        """Return the released model of a defense of the suite under a seed."""
        index = next(i for i, spec in self.build.loaded.defenses_in(self.task) if spec.name == defense)
        return self._released(index, seed)

    def _defended(self, index: int, seed: int) -> Iterator[Measurement]:
        """Yield all measurements of one defense under one seed."""
        released = self._released(index, seed)
        for name, role in self.roles:
            if released.is_weak and role != "target":
                continue
            yield self.before(released, name, role)
            yield from self.attacked(released, name, role)
        for name, role in self.utility:
            yield self.before(released, name, role)

    def _released(self, index: int, seed: int) -> Released:
        """Return the released model of a defense under one seed; its stage is added once."""
        if (index, seed) not in self._made:
            self._made[index, seed] = self.released(index, seed, self._start, self._chosen(index, seed))
        return self._made[index, seed]

    def _chosen(self, index: int, seed: int) -> Mapping[str, Input]:
        """Return the setting that a search chooses for a tuned defense under one seed; none for another defense."""
        tuned = self.build.suite.tuning
        if self.build.suite.defenses[index].tune is None:
            return _STATED
        if not tuned.per_seed:
            seed = self.build.suite.seeds[0]
        if (index, seed) not in self.searches:
            spec = self.spec.model_copy(update={"targets": tuned.targets, "innocents": tuned.innocents})
            grids = [_Grid(self.task, spec, tuple(together), self.build, {}) for together in tuned.targets]
            self.searches[index, seed] = tuning.search_for(self.build, grids, index, seed)
        return {CHOSEN: self.searches[index, seed]}

    def released(
        self, index: int, seed: int, erased: ModelState, setting: Mapping[str, Input] = _STATED, called: str = ""
    ) -> Released:
        """Add the stage of a defense under one seed; `called`: in labels, if not as the suite does."""
        spec = self.build.suite.defenses[index]
        called = called or spec.name
        values = self.build.loaded.parameters["defenses", str(index)]
        given = self.targets if spec.protects == "all" else self.targets[:1]
        cls = registry.get("defense", spec.method)
        immunized = self._release("immunize", cls(values), called, given, seed, erased, setting)
        undefended = None
        if not cls.threat_model.changes:
            none = registry.get("defense", "none")
            nothing = self._release("immunize", none(none.Parameters()), "none", given, seed, erased)
            undefended = erased.over("immunize", nothing)
        return Released(
            defense=spec.name,
            method=spec.method,
            profile=str(getattr(values, "profile", "")),
            seed=seed,
            state=erased.over("immunize", immunized),
            label=f"{called}, {'+'.join(self.targets)}, seed {seed}",
            is_weak=spec.weak,
            undefended=undefended,
            must_honour=frozenset(cls.threat_model.must_honour),
            proposal=setting.get(PROPOSAL),
        )
