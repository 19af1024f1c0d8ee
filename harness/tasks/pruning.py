"""Pruned students: how well recipes suppress concepts while a student is fine-tuned, and whether it survives attacks.

Shirkavand et al. (CVPR 2025) fine-tune a pruned model by distillation while an upper level suppresses concepts, and
compare with fine-tuning first and erasing then. An entry has one student. Each recipe fine-tunes it; one of them
distills only: the control. Three parts, each with its rows:

    general   held-out general captions, drawn once each: quality and alignment
    works     drawn targets against real works of them
    grid      targets, innocents and utility concepts before any attack, and, if the suite has attacks, after them; the
              control takes the place of the undefended model, so gaps are what a recipe adds to distilling

The base model (`unpruned`) and the pruned student before any training (`pruned`) are rows of the first two parts, and
of the grid before any attack.

Differences from the released evaluation (rezashkv/unlearn-ft): each image has a seed, each caption one image; students
are compared with real works, not with the distilled model's own images; every recipe is attacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Table
from harness.contracts.task import Measurement, Task
from harness.core import registry, seeds
from harness.core.registry import register
from harness.plan.builder import Builder, Metric
from harness.stages.originals import OriginalsParameters
from harness.stages.prune import STUDENT, PruneParameters
from harness.stages.replay import ReplayParameters
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.pairs import Pairs
from harness.suite.spec import MethodSpec
from harness.tasks import pruning_checks
from harness.tasks.grid import Grid, Released
from harness.tasks.pruning_data import General
from harness.tasks.pruning_form import PRUNED, UNPRUNED, PruningSpec, RecipeSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

GENERAL, WORKS, GRID = "general", "works", "grid"
"""The parts, as the column `part` of the rows names them."""


@register("task")
class Pruning(Task):
    """Measure recipes that fine-tune a pruned student and suppress concepts."""

    name = "pruning"
    version = 1
    Spec = PruningSpec
    sections = frozenset({"metrics"})
    may_use = frozenset({"attacks", "utility"})

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, PruningSpec]) -> list[Mistake]:
        """Return mistakes in names, roles and methods."""
        return pruning_checks.before_concepts(loaded, entries)

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, PruningSpec]) -> list[Mistake]:
        """Read students and general images; return what does not fit them."""
        return pruning_checks.after_concepts(loaded, entries)

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: PruningSpec) -> int:
        """Return the number of attacked models and of models before any attack."""
        each = 1 + len(loaded.attacks_on(name))
        measured = sum((len(together) + len(spec.innocents)) * each + 1 for together in spec.targets)
        return measured * (2 + len(spec.recipes)) * len(loaded.suite.seeds or ())

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
        """Yield suppression and quality, the attacks, and their pictures."""
        from harness.tasks import pruning_tables

        return pruning_tables.of(run, rows)

    def plan(self, name: str, spec: PruningSpec, build: Builder) -> Iterator[Measurement]:
        """Yield the measurements, one set of targets after the other."""
        plan = _Plan(name, spec, build)
        for together in spec.targets:
            yield from plan.measurements(tuple(together))


@dataclass(frozen=True)
class _Plan:
    """The measurements of one entry."""

    name: str
    spec: PruningSpec
    build: Builder

    @property
    def found(self) -> General:
        return self.build.loaded.found[self.name]

    def measurements(self, targets: tuple[str, ...]) -> Iterator[Measurement]:
        """Yield the measurements of one set of targets."""
        build, spec = self.build, self.spec
        text_metric = next((metric.name for metric in build.metrics if metric.cls.name == "clip_text"), "")
        grid = Grid(self.name, targets, build, {"part": GRID, "text_metric": text_metric})
        roles = [(c, "target") for c in targets] + [(c, "innocent") for c in spec.innocents]
        utility = [(c, "utility") for c in build.suite.utility]
        for name, _ in roles:
            yield grid.real(name)
        for name, _ in utility:
            yield grid.floor(name, targets[0])
        student = self._student()
        for seed in build.suite.seeds:
            untrained = [(UNPRUNED, ModelState()), (PRUNED, student)]
            for label, state in untrained:
                model = Released(label, label, "", seed, state, f"{label}, seed {seed}")
                yield from self._before(grid, model, [*roles, *utility])
            for index, recipe in enumerate(spec.recipes):
                model = self._released(index, recipe, targets, seed, student)
                yield from self._before(grid, model, [*roles, *utility])
                for name, role in roles:
                    yield from grid.attacked(model, name, role)

    def _before(self, grid: Grid, model: Released, roles: Sequence[tuple[str, str]]) -> Iterator[Measurement]:
        """Yield what a model draws before any attack."""
        yield self._general(grid, model)
        for name, role in roles:
            before = grid.before(model, name, role)
            yield before
            if role == "target" and self.spec.works is not None and name in self.found.works:
                yield self._works(grid, model, name, before.observed)

    # -- models ------------------------------------------------------------------------------------------

    def _student(self) -> ModelState:
        """Return the pruned student, before any training."""
        own, build = self.spec.student, self.build
        data: dict[str, str] = {}
        local: dict[str, Any] = {}
        if own.folder is not None:
            found = self.found.student
            data, local = {STUDENT: found.digest}, {STUDENT: str(found.folder)}
        called = f"to {own.keep:g} of its work" if own.keep is not None else "by a given folder"
        key = build.stage(
            "prune", PruneParameters(own.keep, tuple(own.drop) or None), inputs={}, data=data, local=local,
            label=f"prune the model {called}",
        )
        build.unit(build.plan.stages[key].label, [key])
        return ModelState().over("prune", key)

    def _released(
        self, index: int, recipe: RecipeSpec, targets: tuple[str, ...], seed: int, student: ModelState
    ) -> Released:
        """Add the stages of a recipe under one seed."""
        state, values = student, None
        for step, spec in enumerate(recipe.chain):
            path = ("tasks", self.name, "recipes", str(index), "chain", str(step))
            values = self.build.loaded.parameters[path]
            kind = "erase" if step else "distill"
            defense = registry.get("defense", spec.method)(values)
            key = self.build.release(kind, defense, spec.name, targets, (), seed, state, self.found.trained)
            state = state.over(kind, key)
        last = recipe.chain[-1]
        return Released(
            defense=recipe.name,
            # tables and curves compare with the model whose method is none
            method="none" if recipe.is_control else last.method,
            profile=str(getattr(values, "profile", "")),
            seed=seed,
            state=state,
            label=f"{recipe.name}, {'+'.join(targets)}, {self.name}, seed {seed}",
        )

    # -- images ------------------------------------------------------------------------------------------

    def _originals(self, own: Pairs, called: str) -> str:
        """Add the stage that lays out general images or works."""
        build = self.build
        key = build.stage(
            "originals", OriginalsParameters(len(own)), inputs={}, data={"images": own.digest},
            local={"pairs": own.local}, reads_model=False, label=f"{len(own)} {called} of {self.name}",
        )  # fmt: skip
        build.unit(build.plan.stages[key].label, [key])
        return key

    def _metric(self, spec: MethodSpec, *path: str | int) -> Metric:
        return self.build.metric(spec, "tasks", self.name, *path)

    def _general(self, grid: Grid, model: Released) -> Measurement:
        """Add the drawing of held-out captions and its scores."""
        build, own, spec = self.build, self.found.held_out, self.spec
        text = f"general captions ({model.label})"
        replay = build.stage(
            "replay",
            ReplayParameters(
                own.captions, replace(build.sampling, images_per_prompt=1), "per_prompt", "epsilon"
            ),
            inputs=build.inputs_of(model.state),
            seed=seeds.derive("sampling", model.seed, GENERAL),  # without the model: all meet the same starting noise
            label=f"draw {text}",
            work=len(own) * build.sampling.passes_an_image,
        )
        originals = self._originals(own, "held-out general images")
        scores = {}
        metrics = [self._metric(given, "quality", index) for index, given in enumerate(spec.quality)]
        if spec.alignment is not None:
            metrics.append(self._metric(spec.alignment, "alignment"))
        for metric in metrics:
            scores[metric.name] = build.score(
                metric, {"sample": build.read(replay)}, originals, f"general images of {self.name}", own.captions, text
            )
        build.unit(f"draw {text}", [replay, *scores.values()])
        return self._measured(grid, model, GENERAL, GENERAL, GENERAL, replay, scores)

    def _works(self, grid: Grid, model: Released, target: str, sample: str) -> Measurement:
        """Add the scores of drawn targets against real works of them."""
        build, own, metric = self.build, self.found.works[target], self._metric(self.spec.works, "works")
        words = tuple(each.description for each in build.concepts[target].evaluations)
        text = f"{target} against real works ({model.label})"
        score = build.score(
            metric, {"sample": build.read(sample)}, self._originals(own, f"real works of {target}"),
            f"real works of {target}", words, text,
        )  # fmt: skip
        build.unit(f"score {text}", [score])
        return self._measured(grid, model, target, "target", WORKS, sample, {metric.name: score})

    def _measured(
        self, grid: Grid, model: Released, concept: str, role: str, part: str, observed: str, scores: dict[str, str]
    ) -> Measurement:
        """Return the measurement of another part, with the grid's labels."""
        own = grid.measurement(model, concept, role, (0,), observed, scores)
        return replace(own, labels={**own.labels, "part": part})
