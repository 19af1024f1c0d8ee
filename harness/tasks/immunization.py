"""Immunization: defenses before the release, adaptation after it, over a grid defense x attack x concept x seed.

The undefended model is a row like the others, measured under the same attack seed, so every gap is paired. An innocent
concept is adapted by the same attack as a target. Stages that vary least are planned first and shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from harness.analysis.curves import COLUMNS as CURVE_COLUMNS
from harness.analysis.curves import curves
from harness.analysis.leaderboard import COLUMNS, CONCEPT_COLUMNS, by_concept
from harness.contracts.defense import Defense
from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Section, Table
from harness.contracts.task import Measurement, Task
from harness.core import registry, search, seeds
from harness.core.concept import Concept
from harness.core.identity import Input
from harness.core.registry import register
from harness.plan.builder import Builder, cycled
from harness.results import headline, leaderboard
from harness.results.figures import recovery_curves
from harness.stages.adapt import AdaptParameters, AttackerKnows, Judge, ProbeParameters, SpentBudget
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import AttackSpec
from harness.tasks import immunization_checks
from harness.tasks.immunization_form import ImmunizationSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

HELD_OUT = 3
"""An adaptive attacker holds out one in this many of its images to judge probes."""


@register("task")
class Immunization(Task):
    """Measure how badly released models can be adapted to targets, and how well to innocents."""

    name = "immunization"
    version = 1
    Spec = ImmunizationSpec
    sections = frozenset({"defenses", "attacks", "metrics", "utility"})

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, ImmunizationSpec]) -> list[Mistake]:
        """Return mistakes in names, roles and methods that do not fit together."""
        return immunization_checks.before_concepts(loaded, entries)

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, ImmunizationSpec]) -> list[Mistake]:
        """Return mistakes in images and words: those that are missing, or seen by both sides."""
        return immunization_checks.after_concepts(loaded, entries)

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: ImmunizationSpec) -> int:
        """Return the number of attacked models and of models before any attack."""
        each = 1 + len(loaded.attacks_on(name))
        measured = sum((len(together) + len(spec.innocents)) * each for together in spec.targets)
        measured += len(loaded.suite.utility) * len(spec.targets)
        return measured * len(loaded.defenses_in(name)) * len(loaded.suite.seeds or ())

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
        """Yield the leaderboard, its worst case, how soon attacks recover, single concepts, and recovery curves."""
        found, measured = run.claims, run.measurements
        lines, worst, soon, concepts = found.lines, found.worst, curves(measured), by_concept(measured)
        short = headline.section(found.headlines, lines)
        yield Table("leaderboard", COLUMNS, lines, leaderboard.sections(lines, worst, soon, short))
        yield Table("worst_case", COLUMNS, worst)
        yield Table("curves", CURVE_COLUMNS, soon)
        yield Table("concepts", CONCEPT_COLUMNS, concepts, leaderboard.concept_sections(concepts))
        for role in ("target", "innocent"):
            yield Figure(f"recovery_{role}", partial(recovery_curves, measured, role=role))

    def shown(self, made: Sequence[Table | Figure]) -> list[Section]:
        """Return the sections of the leaderboard and of its worst case, then what is short."""
        main, worst = made[:2]
        short = next((section for section in main.sections if section.title == headline.TITLE), None)
        return leaderboard.shown(main.lines, worst.lines, short)

    def plan(self, name: str, spec: ImmunizationSpec, build: Builder) -> Iterator[Measurement]:
        """Yield the measurements, one protected set after the other."""
        for together in spec.targets:
            yield from _Grid(name, spec, tuple(together), build).measurements()


@dataclass(frozen=True)
class _Released:
    """A released model under one seed, with the labels that its measurements use."""

    defense: str
    method: str
    profile: str
    seed: int
    state: ModelState
    label: str
    is_weak: bool = False
    undefended: ModelState | None = None  # the state of `none`, where the defense changes no weight
    must_honour: frozenset[str] = frozenset()

    def met_by(self, attack: AttackSpec | None) -> ModelState:
        """Return the state that an attack (None: sampling before any attack) works on.

        A defense that changes no weight has no effect on attackers who ignore its frozen names and hooks, nor on an
        honest attack that these do not concern: both share the stages of the undefended model.
        """
        if self.undefended is None:
            return self.state
        if attack is None:
            is_affected = "sampling_hooks" in self.must_honour
        elif attack.attacker == "adaptive":
            is_affected = False
        else:
            trains = registry.get("attack", attack.method).trains_released_weights
            is_affected = bool(self.must_honour - {"frozen"}) or ("frozen" in self.must_honour and trains)
        return self.state if is_affected else self.undefended


class _Grid:
    """The measurements of one protected set: every defense, attack, concept and seed."""

    def __init__(self, task: str, spec: ImmunizationSpec, targets: tuple[str, ...], build: Builder):
        self.task, self.spec, self.targets, self.build = task, spec, targets, build
        self.roles = [(c, "target") for c in targets] + [(c, "innocent") for c in spec.innocents]
        self.utility = [(c, "utility") for c in build.suite.utility]

    def measurements(self) -> Iterator[Measurement]:
        """Yield them in the order of the table: real images, then per seed the model before erasure and defenses."""
        erased = self._erased()
        for name, _ in self.roles:
            yield self._real(name)
        for name, _ in self.utility:
            yield self._floor(name, self.targets[0])
        for seed in self.build.suite.seeds:
            if erased.layers:
                original = _Released("original", "none", "", seed, ModelState(), f"original, seed {seed}")
                for name, role in [*self.roles, *self.utility]:
                    yield self._before(original, name, role)
            for index, _ in self.build.loaded.defenses_in(self.task):
                yield from self._defended(index, seed, erased)

    def _erased(self) -> ModelState:
        """Return the state that defenses start from: the base model, erased if the task erases."""
        if self.spec.erase is None:
            return ModelState()
        values = self.build.loaded.parameters["tasks", self.task, "erase"]
        eraser = registry.get("defense", self.spec.erase.method)(values)
        seed = self.build.suite.images.seed
        key = self._release("erase", eraser, self.spec.erase.name, self.targets, seed, ModelState())
        return ModelState().over("erase", key)

    def _release(
        self, kind: str, defense: Defense, called: str, targets: Sequence[str], seed: int, over: ModelState
    ) -> str:
        return self.build.release(kind, defense, called, targets, self.spec.preserve, seed, over)

    def _defended(self, index: int, seed: int, erased: ModelState) -> Iterator[Measurement]:
        """Yield all measurements of one defense under one seed."""
        released = self._released(index, seed, erased)
        for name, role in self.roles:
            if released.is_weak and role != "target":
                continue
            yield self._before(released, name, role)
            for attack_index, attack in self.build.loaded.attacks_on(self.task):
                if role == "target" or attack.innocents:
                    yield _Attack(self, released, name, role, attack_index).measurement()
        for name, role in self.utility:
            yield self._before(released, name, role)

    def _released(self, index: int, seed: int, erased: ModelState) -> _Released:
        """Add the stage of a defense under one seed."""
        spec = self.build.suite.defenses[index]
        values = self.build.loaded.parameters["defenses", str(index)]
        given = self.targets if spec.protects == "all" else self.targets[:1]
        cls = registry.get("defense", spec.method)
        immunized = self._release("immunize", cls(values), spec.name, given, seed, erased)
        undefended = None
        if not cls.threat_model.changes:
            none = registry.get("defense", "none")
            nothing = self._release("immunize", none(none.Parameters()), "none", given, seed, erased)
            undefended = erased.over("immunize", nothing)
        return _Released(
            defense=spec.name,
            method=spec.method,
            profile=str(getattr(values, "profile", "")),
            seed=seed,
            state=erased.over("immunize", immunized),
            label=f"{spec.name}, {'+'.join(self.targets)}, seed {seed}",
            is_weak=spec.weak,
            undefended=undefended,
            must_honour=frozenset(cls.threat_model.must_honour),
        )

    def _real(self, name: str) -> Measurement:
        """Add the scores of real images: the ceiling that an attack can reach."""
        build, images = self.build, self.build.images(name)
        concept = build.concepts[name]
        scores = build.scores(concept, {"images": build.read(images)}, f"real images of {name}", concept.descriptions)
        build.unit(f"score real images of {name}", scores.values())
        return self.measurement(None, name, "real", (0,), images, scores)

    def _floor(self, name: str, other: str) -> Measurement:
        """Add the scores of another concept's images: those of a model that draws something else."""
        build = self.build
        concept, images = build.concepts[name], build.images(other)
        words = [e.description for e in concept.evaluations]
        descriptions = cycled(words, build.concepts[other].count("attack"))
        text = f"images of {other} against the references of {name} (floor)"
        scores = build.scores(concept, {"images": build.read(images)}, text, descriptions)
        build.unit(f"score {text}", scores.values())
        return self.measurement(None, name, "floor", (0,), images, scores)

    def _before(self, released: _Released, name: str, role: str) -> Measurement:
        """Add the images that the released model draws before any attack (step 0)."""
        build, concept = self.build, self.build.concepts[name]
        text = f"{name} before the attack ({released.label})"
        sample = build.sample(concept, released.seed, (0,), released.met_by(None).inputs(), f"sample {text}")
        scores = build.scores(concept, {"sample": build.read(sample)}, text)
        build.unit(f"sample {text}", [sample, *scores.values()])
        return self.measurement(released, name, role, (0,), sample, scores)

    def measurement(
        self,
        released: _Released | None,
        concept: str,
        role: str,
        steps: tuple[int, ...],
        observed: str,
        scores: Mapping[str, str],
        attack: AttackSpec | None = None,
    ) -> Measurement:
        """Return the measurement of a concept; `released` None: for images that no released model drew."""
        defended = released.state.layers[-1:] if released is not None else ()
        return Measurement(
            labels={
                "task": self.task,
                "defense": released.defense if released else "",
                "method": released.method if released else "",
                "profile": released.profile if released else "",
                "is_weak": released.is_weak if released else False,
                "protected": self.targets,
                "attack": attack.name if attack else "",
                "attacker": attack.attacker if attack else "",
                "n_probes": attack.search.probes if attack and attack.search else 0,
                "concept": concept,
                "role": role,
                "seed": released.seed if released else 0,
            },
            observed=observed,
            scores=scores,
            steps=steps,
            needs={layer.kind: layer.key for layer in defended},
            is_apart=attack is not None,
        )


class _Attack:
    """One attack on one concept: the probes of an adaptive attacker, the trajectory, its images and their scores."""

    def __init__(self, grid: _Grid, released: _Released, concept: str, role: str, index: int):
        self.grid, self.build, self.released, self.role = grid, grid.build, released, role
        self.concept: Concept = self.build.concepts[concept]
        self.index = index
        self.spec = self.build.suite.attacks[index]
        self.cls = registry.get("attack", self.spec.method)
        self.values = self.build.loaded.parameters["attacks", str(index)]
        self.steps, self.batch_size = self.build.loaded.budget(index)
        self.called = self.cls.called(self.values, self.concept.words)
        self.identity, self.local = self.build.identified(self.cls, self.values)
        self.space = _space(self.spec, self.cls, self.values)
        self.prior = _prior_images(self.cls, self.values, self.space)
        self.text = f"{self.spec.name} on {concept} ({released.label})"
        self.work = float(self.steps[-1] * self.batch_size * self.cls.passes_an_example(self.values))

    def measurement(self) -> Measurement:
        """Add all stages of the attack, and return its measurement."""
        build, spec, concept, seed = self.build, self.spec, self.concept, self.released.seed
        shared = build.share("adapt", self.index, concept.name, make=self._parameters)
        state = self.released.met_by(spec).inputs()
        inputs = {**state, "images": build.read(build.images(concept.name))}
        if self.prior:
            inputs["prior"] = build.read(build.prior_images(concept, self.prior))
        if spec.search is not None:
            inputs |= self._probes(shared["parameters"], inputs)
        workers = build.suite.resources.workers
        adapt = build.stage(
            "adapt",
            **shared,
            component=registry.component(self.cls),
            inputs=inputs,
            local={"parameters": self.local} if self.local else {},
            seed=seeds.derive("attack", seed, concept.name),  # without the defense: all meet the same noise
            label=f"adapt {self.text}",
            work=self.work,
            workers=workers if self.cls.can_share(self.values) and self.batch_size % workers == 0 else 1,
        )
        sample = build.sample(
            concept, seed, self.steps, {**state, "adapt": build.read(adapt)}, f"sample {self.text}",
            called=self.called, restore=tuple(sorted(spec.restore)),
            attacker=None if spec.attacker == "honest" else spec.attacker,
        )  # fmt: skip
        scores = build.scores(concept, {"sample": build.read(sample)}, self.text, images=spec.images)
        build.unit(self.text, [adapt, sample, *scores.values()])
        return self.grid.measurement(
            self.released, concept.name, self.role, self.steps, sample, scores, spec
        )

    def _parameters(self) -> AdaptParameters:
        concept = self.concept
        return AdaptParameters(
            parameters=self.identity,
            budget=SpentBudget(self.steps, self.batch_size, self.spec.images),
            attacker=self.spec.attacker,
            concept=AttackerKnows(
                kind=concept.kind,
                captions=tuple(concept.words.renamed(text, self.called) for text in concept.captions["attack"]),
                called=self.called,
                words=concept.words if self.cls.uses_words else None,
                prior_captions=cycled(concept.class_prompts, self.prior) if self.prior else None,
            ),
            restore=tuple(sorted(self.spec.restore)) or None,
        )

    def _probes(self, attack: AdaptParameters, inputs: Mapping[str, Input]) -> dict[str, Input]:
        """Add the probes of an adaptive attacker's search on one released model; return them by role."""
        build, concept, count = self.build, self.concept, self.spec.search.probes
        base = self.released.seed, concept.name
        new = search.explored(count)
        probes: dict[str, Input] = {}

        def add(index: int, known: Mapping[str, Input], which: Mapping[str, int], seed: int) -> None:
            label = f"probe {index + 1} of {count}: {self.text}"
            key = build.stage(
                "probe",
                self._probe(attack, which),
                component=registry.component(self.cls),
                inputs={**inputs, **known},
                local={"parameters": dict(self.local), "metric": self._judge().local},
                seed=seed,
                label=label,
                work=self.work + len(concept.probes) * search.IMAGES * build.sampling.passes_an_image,
            )
            probes[f"probe.{index}"] = build.read(key)
            build.unit(label, [key])

        at_once = self.spec.search.at_once
        for first in range(0, new, at_once):
            known = dict(probes)
            for index in range(first, min(first + at_once, new)):
                add(index, known, {"place": index - first}, seeds.derive("search", *base))
        known = dict(probes)
        for place in range(count - new):
            pair = place // 2 + 1  # both of a pair have one seed, so that only their settings differ
            add(new + place, known, {"repeat": place}, seeds.derive("search", *base, pair))
        return probes

    def _judge(self) -> Any:
        """Return the metric of the suite that probes are judged by."""
        wanted = self.spec.search.metric or search.judge(self.build.suite.metrics)
        return next(metric for metric in self.build.metrics if metric.name == wanted)

    def _probe(self, attack: AdaptParameters, which: Mapping[str, int]) -> ProbeParameters:
        """Return the parameters of a probe: the attack's, its search space, and how it is judged."""
        concept, judge = self.concept, self._judge()
        available = attack.budget.images or concept.count("attack")
        return ProbeParameters(
            parameters=attack.parameters,
            budget=attack.budget,
            attacker=attack.attacker,
            concept=attack.concept,
            restore=attack.restore,
            space=self.space,
            search=search.VERSION,
            held_out=max(1, available // HELD_OUT),
            prompts=tuple(concept.words.renamed(e.prompt, self.called) for e in concept.probes),
            descriptions=tuple(e.description for e in concept.probes),
            sampling=self.build.sampling.alone,
            metric=Judge(judge.component, judge.parameters),
            **which,
        )


def _space(attack: AttackSpec, cls: type, values: Any) -> dict[str, Any]:
    """Return the search space of the attack, as JSON values; {} without a search."""
    if attack.search is None:
        return {}
    return search.as_json(search.given(attack.search.space) or cls.search_space(values))


def _prior_images(cls: type, values: Any, space: Mapping[str, Any]) -> int:
    """Return the largest number of class images that the attack may train on, for any choice of its search."""
    prior = cls.prior_images(values)
    if "prior_weight" in space or "prior_images" in space:
        asked = space.get("prior_images", {}).get("values", [getattr(values, "prior_images", 0)])
        prior = max(prior, *asked)
    return prior
