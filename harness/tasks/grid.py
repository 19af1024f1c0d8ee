"""What is measured of released models of one protected set: images before any attack, and attacks on concepts.

Tasks that release models share it: they make the states (`Released`), and yield what `Grid` measures of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from harness.contracts.state import ModelState
from harness.contracts.task import Label, Measurement
from harness.core import registry, search, seeds
from harness.core.concept import Concept
from harness.core.identity import Input
from harness.core.tuning import PROPOSAL
from harness.plan.builder import Builder, cycled
from harness.stages.adapt import AdaptParameters, AttackerKnows, Judge, ProbeParameters, SpentBudget
from harness.suite.spec import AttackSpec

RELAPSE = "relapse"
"""The role of a target that was drawn after an adaptation on something else, or after none."""
HELD_OUT = 3
"""An adaptive attacker holds out one in this many of its images to judge probes."""


@dataclass(frozen=True)
class Released:
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
    proposal: Input | None = None  # of a probe of a tuned defense: the stage that proposed its setting

    def seen_by(self, attack: AttackSpec | None, build: Builder) -> dict[str, Input]:
        """Return the inputs of a stage on the state that `met_by` returns; those of a probe are marked as such."""
        state = self.met_by(attack)
        mark = {PROPOSAL: self.proposal} if self.proposal is not None and state is self.state else {}
        return {**build.inputs_of(state), **mark}

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


class Grid:
    """The measurements of one protected set; see the module."""

    def __init__(
        self, task: str, targets: tuple[str, ...], build: Builder, further: Mapping[str, Label] = MappingProxyType({})
    ):
        """`further`: labels that all its measurements have beside the grid's."""
        self.only: frozenset[str] | None = None  # labels of the metrics that score; None: all
        self.task, self.targets, self.build, self.further = task, targets, build, further
        self._attacks: dict[tuple[int, str], Attack] = {}
        self._needs: dict[tuple[Input, ...], dict[str, str]] = {}

    def attacked(self, released: Released, name: str, role: str) -> Iterator[Measurement]:
        """Yield the measurement of each attack of the task on a concept."""
        for index, attack in self.build.loaded.attacks_on(self.task):
            learns = registry.get("attack", attack.method).takes_steps and attack.adapts_innocents
            if role == "target" or learns:
                made = self.attacked_by(index, released, name, role)
                yield made
                if role == "target" and self._attack(index, name).is_blind:
                    yield replace(made, labels={**made.labels, "role": RELAPSE})
                if role == "innocent" and attack.observes_targets and not released.is_weak:
                    for target in self.targets:
                        yield self._attack(index, name).on_target(released, target)

    def attacked_by(self, index: int, released: Released, name: str, role: str) -> Measurement:
        """Add one attack of the suite on a concept."""
        return self._attack(index, name).measurement(released, role)

    def _attack(self, index: int, name: str) -> Attack:
        """Return an attack on a concept, made once."""
        if (index, name) not in self._attacks:
            self._attacks[index, name] = Attack(self, name, index)
        return self._attacks[index, name]

    def tuned_on(self, defense: str, seed: int) -> Released:
        """Return the released model of a defense, on which an attack with `tuned_on` is tuned."""
        raise NotImplementedError(f"{type(self).__name__} has no released models by name")

    def real(self, name: str) -> Measurement:
        """Add the scores of real images: the ceiling that an attack can reach."""
        build, images = self.build, self.build.images(name)
        concept = build.concepts[name]
        text = f"real images of {name}"
        scores = build.scores(concept, {"images": build.read(images)}, text, concept.descriptions, only=self.only)
        build.unit(f"score real images of {name}", scores.values())
        return self.measurement(None, name, "real", (0,), images, scores)

    def floor(self, name: str, other: str) -> Measurement:
        """Add the scores of another concept's images: those of a model that draws something else."""
        build = self.build
        concept, images = build.concepts[name], build.images(other)
        words = [e.description for e in concept.evaluations]
        descriptions = cycled(words, build.concepts[other].count("attack"))
        text = f"images of {other} against the references of {name} (floor)"
        scores = build.scores(concept, {"images": build.read(images)}, text, descriptions, only=self.only)
        build.unit(f"score {text}", scores.values())
        return self.measurement(None, name, "floor", (0,), images, scores)

    def before(self, released: Released, name: str, role: str) -> Measurement:
        """Add the images that the released model draws before any attack (step 0)."""
        build, concept = self.build, self.build.concepts[name]
        text = f"{name} before the attack ({released.label})"
        sample = build.sample(concept, released.seed, (0,), released.seen_by(None, build), text)
        scores = build.scores(concept, {"sample": build.read(sample)}, text, only=self.only)
        build.unit(f"sample {text}", [sample, *scores.values()])
        return self.measurement(released, name, role, (0,), sample, scores)

    def measurement(
        self,
        released: Released | None,
        concept: str,
        role: str,
        steps: tuple[int, ...],
        observed: str,
        scores: Mapping[str, str],
        attack: AttackSpec | None = None,
        **labels: Label,
    ) -> Measurement:
        """Return the measurement of a concept; `released` None: for images that no released model drew.

        `labels`: those that only some measurements have.
        """
        defended = released.state.layers[-1:] if released is not None else ()
        if defended not in self._needs:
            self._needs[defended] = {layer.kind: layer.key for layer in defended}
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
                **({"tuned_on": attack.tuned_on} if attack and attack.tuned_on else {}),
                **self.further,
                **labels,
            },
            observed=observed,
            scores=scores,
            steps=steps,
            needs=self._needs[defended],
            is_apart=attack is not None,
        )


class Attack:
    """One attack on one concept: the probes of an adaptive attacker, the trajectory, its images and their scores."""

    def __init__(self, grid: Grid, concept: str, index: int):
        self.grid, self.build = grid, grid.build
        self.index = index
        self.spec = self.build.suite.attacks[index]
        self.concept: Concept = self.build.concepts[concept]
        """What is drawn and scored."""
        self.trained: Concept = self.build.loaded.general if self.spec.trains_on == "general" else self.concept
        """What it trains on."""
        self.cls = registry.get("attack", self.spec.method)
        self.values = self.build.loaded.parameters["attacks", str(index)]
        self.steps, self.batch_size = self.build.loaded.budget(index)
        self.called = self.cls.called(self.values, self.trained.words)
        """Its name for what it trains on."""
        self.identity, self.local = self.build.identified(self.cls, self.values)
        self.space = _space(self.spec, self.cls, self.values)
        self.prior = _prior_images(self.cls, self.values, self.space)
        self.work = float(self.steps[-1] * self.batch_size * self.cls.passes_an_example(self.values))

    @property
    def is_blind(self) -> bool:
        """Whether it never sees the target: it takes no step, or trains on general images."""
        return not self.cls.takes_steps or self.trained is not self.concept

    def measurement(self, released: Released, role: str) -> Measurement:
        """Add all stages of the attack on a released model, and return its measurement."""
        return self._drawn(released, self.concept, self.called if not self.is_blind else None, role)

    def on_target(self, released: Released, target: str) -> Measurement:
        """Add what the model that was adapted to this innocent draws of a target, in its own words."""
        return self._drawn(released, self.build.concepts[target], None, RELAPSE, adapted_to=self.concept.name)

    def _drawn(
        self, released: Released, concept: Concept, called: str | None, role: str, **labels: Label
    ) -> Measurement:
        """Add the adaptation, what it draws of a concept, and the scores; `called`: its name for the concept."""
        build, spec = self.build, self.spec
        text = f"{spec.name} on {self.trained.name} ({released.label})"
        state = released.seen_by(spec, build)
        members, inputs = [], dict(state)
        if self.cls.takes_steps:
            members = [self._adapted(released, text, state)]
            inputs["adapt"] = build.read(members[0])
        else:
            text = f"{concept.name} by {spec.name} ({released.label})"
        is_taught = self.cls.takes_steps and concept is self.trained
        if self.cls.takes_steps and not is_taught:
            text = f"{concept.name} after {text}"
        sample = build.sample(
            concept, released.seed, self.steps, inputs, text,
            called=called, restore=tuple(sorted(spec.restore)),
            attacker=None if spec.attacker == "honest" else spec.attacker, rounded_to=spec.rounded_to,
        )  # fmt: skip
        scores = build.scores(
            concept, {"sample": build.read(sample)}, text, images=spec.images, is_taught=is_taught, only=self.grid.only
        )  # fmt: skip
        if members and not is_taught:  # several draw from one adaptation
            build.unit_with(text, members[0], [sample, *scores.values()])
        else:
            build.unit(text, [*members, sample, *scores.values()])
        return self.grid.measurement(released, concept.name, role, self.steps, sample, scores, spec, **labels)

    def _adapted(self, released: Released, text: str, state: Mapping[str, Input]) -> str:
        """Add the adaptation of a released model, and the probes of a search; return its key."""
        build, spec, trained, seed = self.build, self.spec, self.trained, released.seed
        shared = build.share("adapt", self.index, trained.name, make=self._parameters)
        images = build.images(trained.name) if trained is self.concept else build.general_images()
        inputs = {**state, "images": build.read(images)}
        if self.prior:
            inputs["prior"] = build.read(build.prior_images(trained, self.prior))
        if spec.search is not None:
            inputs |= self._probes(released, shared["parameters"], inputs)
        workers = build.suite.resources.workers
        return build.stage(
            "adapt",
            **shared,
            component=registry.component(self.cls),
            inputs=inputs,
            local={"parameters": self.local} if self.local else {},
            seed=seeds.derive("attack", seed, trained.name),  # without the defense: all meet the same noise
            label=text,
            what="adapt",
            work=self.work,
            workers=workers if self.cls.can_share(self.values) and self.batch_size % workers == 0 else 1,
        )

    def _parameters(self) -> AdaptParameters:
        concept = self.trained
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
            rounded_to=self.spec.rounded_to,
        )

    def _probes(self, released: Released, attack: AdaptParameters, inputs: Mapping[str, Input]) -> dict[str, Input]:
        """Add the probes of an adaptive attacker's search; return them by role.

        They are tried on the released model, or on that of the defense of `tuned_on` under the same seed. `inputs`:
        those of the adaptation.
        """
        build, concept, count = self.build, self.concept, self.spec.search.probes
        if self.spec.tuned_on is not None:
            own = build.inputs_of(released.met_by(self.spec))
            released = self.grid.tuned_on(self.spec.tuned_on, released.seed)
            kept = {role: read for role, read in inputs.items() if role not in own}
            inputs = {**build.inputs_of(released.met_by(self.spec)), **kept}
        text = f"{self.spec.name} on {concept.name} ({released.label})"
        base = released.seed, concept.name
        new = search.explored(count)
        probes: dict[str, Input] = {}

        def add(index: int, known: Mapping[str, Input], which: Mapping[str, int], seed: int) -> None:
            label = f"probe {index + 1} of {count}: {text}"
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
            rounded_to=attack.rounded_to,
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
