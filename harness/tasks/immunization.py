"""The grid of a suite, walked: every trial with its stages. Pure: nothing is read but the suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from harness.core import registry, search, seeds
from harness.core.concept import Concept
from harness.plan.builder import PlanStages, cycled
from harness.plan.graph import Plan, Trial
from harness.suite.spec import AttackSpec, TaskSpec

HELD_OUT = 3
"""An adaptive attacker judges probes on one in so many of its own images."""


@dataclass(frozen=True)
class _Released:
    """A released model under one seed, as the trials that attack it name it."""

    task: str
    defense: str
    method: str
    profile: str
    protected: tuple[str, ...]
    seed: int
    weights: Mapping[str, str]  # the stages whose changes lie over the base model
    label: str
    is_weak: bool = False
    undefended: Mapping[str, str] | None = None  # `weights` of `none`, where the defense changes no weight
    must_honour: frozenset[str] = frozenset()

    def met_by(self, attack: AttackSpec | None) -> Mapping[str, str]:
        """Return the stages that an attack (None: sampling before any) can feel anything of.

        A defense that changes no weight is not there for those who do not honour what it asks for, nor for an honest
        attack that has nothing to do with it: they share the stages of the undefended model.
        """
        if self.undefended is None:
            return self.weights
        if attack is None:
            felt = "sampling_hooks" in self.must_honour
        elif attack.attacker == "adaptive":
            felt = False
        else:
            trains = registry.get("attack", attack.method).trains_released_weights
            felt = bool(self.must_honour - {"frozen"}) or ("frozen" in self.must_honour and trains)
        return self.weights if felt else self.undefended


class Planner(PlanStages):
    """Builds one plan."""

    def plan(self) -> Plan:
        suite = self.suite
        for task_name, task in suite.tasks.items():
            for together in task.targets:
                self._protected_set(task_name, task, tuple(together))
        self.result.units = list(self.units.values())
        return self.result

    def _protected_set(self, task_name: str, task: TaskSpec, targets: tuple[str, ...]) -> None:
        """Add all trials of one protected set: every defense, attack, concept and seed."""
        suite, loaded = self.suite, self.loaded
        preserve = tuple(task.preserve)
        erased = None
        if task.erase is not None:
            values = loaded.parameters["tasks", task_name, "erase"]
            eraser = registry.get("defense", task.erase.method)
            erased = self.protective(
                "erase", eraser, task.erase.name, values, targets, preserve, suite.images.seed, None
            )
        real = _Released(task_name, "", "", "", targets, 0, {}, "")
        roles = [(c, "target") for c in targets] + [(c, "innocent") for c in task.innocents]
        for name, _ in roles:
            self._real(real, name)
        for name in suite.utility:
            self._floor(real, name, targets[0])
        for seed in suite.seeds:
            if erased:
                original = _Released(task_name, "original", "none", "", targets, seed, {}, f"original, seed {seed}")
                for name, role in [*roles, *((c, "utility") for c in suite.utility)]:
                    self._before(original, name, role)
            for index, spec in loaded.defenses_in(task_name):
                values = loaded.parameters["defenses", str(index)]
                given = targets if spec.protects == "all" else targets[:1]
                cls = registry.get("defense", spec.method)
                immunized = self.protective("immunize", cls, spec.name, values, given, preserve, seed, erased)
                over = {"erase": erased} if erased else {}
                undefended = None
                if not cls.threat_model.changes:
                    none = registry.get("defense", "none")
                    nothing = self.protective(
                        "immunize", none, "none", none.Parameters(), given, preserve, seed, erased
                    )
                    undefended = {"immunize": nothing, **over}
                released = _Released(
                    task=task_name,
                    defense=spec.name,
                    method=spec.method,
                    profile=str(getattr(values, "profile", "")),
                    protected=targets,
                    seed=seed,
                    weights={"immunize": immunized, **over},
                    label=f"{spec.name}, {'+'.join(targets)}, seed {seed}",
                    is_weak=spec.weak,
                    undefended=undefended,
                    must_honour=frozenset(cls.threat_model.must_honour),
                )
                for name, role in roles:
                    if spec.weak and role != "target":
                        continue
                    self._before(released, name, role)
                    for attack_index, attack in loaded.attacks_on(task_name):
                        if role == "target" or attack.innocents:
                            self._attacked(released, name, role, attack_index)
                for name in suite.utility:
                    self._before(released, name, "utility")

    def _real(self, nothing: _Released, name: str) -> None:
        """Add the scores of real images: the ceiling that an attack can reach."""
        images = self.images(name)
        concept = self.concepts[name]
        scores = self.scores(concept, {"images": images}, f"real images of {name}", concept.descriptions)
        self.unit(f"score real images of {name}", scores.values())
        self._trial(nothing, name, "real", (0,), images, scores)

    def _floor(self, nothing: _Released, name: str, other: str) -> None:
        """Add the scores that images of another concept get: what a model that draws something else would have."""
        concept, images = self.concepts[name], self.images(other)
        words = tuple(e.description for e in concept.evaluations)
        descriptions = tuple(words[i % len(words)] for i in range(self.concepts[other].count("attack")))
        text = f"images of {other} as if of {name}"
        scores = self.scores(concept, {"images": images}, text, descriptions)
        self.unit(f"score {text}", scores.values())
        self._trial(nothing, name, "floor", (0,), images, scores)

    def _before(self, released: _Released, name: str, role: str) -> None:
        """Add what the released model draws before any attack (step 0)."""
        concept = self.concepts[name]
        text = f"{name} before the attack ({released.label})"
        sample = self.sample(concept, released.seed, (0,), released.met_by(None), f"sample {text}")
        scores = self.scores(concept, {"sample": sample}, text)
        self.unit(f"sample {text}", [sample, *scores.values()])
        self._trial(released, name, role, (0,), sample, scores)

    def _attacked(self, released: _Released, name: str, role: str, attack_index: int) -> None:
        """Add one attack on one concept: the trajectory, its images and their scores."""
        attack = self.suite.attacks[attack_index]
        concept = self.concepts[name]
        cls = registry.get("attack", attack.method)
        steps, batch_size = self.loaded.budget(attack_index)
        values = self.loaded.parameters["attacks", str(attack_index)]
        called, prior = cls.called(values, concept.words), cls.prior_images(values)
        text = f"{attack.name} on {name} ({released.label})"
        identity, local = self.identified(cls, values)
        restored = {"restore": sorted(attack.restore)} if attack.restore else {}
        liberties = restored if attack.attacker == "honest" else {**restored, "attacker": attack.attacker}
        space = self._space(attack, cls, values)
        if "prior_weight" in space or "prior_images" in space:
            asked = space.get("prior_images", {}).get("values", [getattr(values, "prior_images", 0)])
            prior = max(prior, *asked)

        def describe() -> dict[str, Any]:
            known = {
                "kind": concept.kind,
                "captions": [concept.words.renamed(text, called) for text in concept.captions["attack"]],
                "called": called,
            }
            if cls.uses_words:
                known["words"] = asdict(concept.words)
            if prior:
                known["prior_captions"] = cycled(concept.class_prompts, prior)
            return {
                "parameters": identity,
                "budget": {"steps": list(steps), "batch_size": batch_size, "images": attack.images},
                "attacker": attack.attacker,
                "concept": known,
                **restored,
            }

        described, described_json = self.share("adapt", attack_index, name, make=describe)
        weights = released.met_by(attack)
        inputs = {**weights, "images": self.images(name)}
        if prior:
            inputs["prior"] = self.prior_images(concept, prior)
        work = float(steps[-1] * batch_size * cls.passes_an_example(values))
        workers = self.suite.resources.workers
        if attack.search is not None:
            inputs |= self._probes(attack, concept, called, described, space, inputs, local, released, text, work)
        adapt = self.add(
            kind="adapt",
            component=registry.component(cls),
            parameters=described,
            parameters_json=described_json,
            inputs=inputs,
            data={},
            local={"parameters": local} if local else {},
            seed=seeds.derive("attack", released.seed, name),  # names no defense: all meet the same noise
            label=f"adapt {text}",
            work=work,
            workers=workers if cls.can_share(values) and batch_size % workers == 0 else 1,
        )
        inputs = {**weights, "adapt": adapt}
        sample = self.sample(concept, released.seed, steps, inputs, f"sample {text}", called, liberties)
        scores = self.scores(concept, {"sample": sample}, text, images=attack.images)
        self.unit(text, [adapt, sample, *scores.values()])
        self._trial(released, name, role, steps, sample, scores, attack)

    @staticmethod
    def _space(attack: AttackSpec, cls: type, values: Any) -> dict[str, Any]:
        """Return what the attack's search may change, as JSON values; {} without a search."""
        if attack.search is None:
            return {}
        return search.as_json(search.given(attack.search.space) or cls.search_space(values))

    def _probes(
        self,
        attack: AttackSpec,
        concept: Concept,
        called: str,
        described: Mapping[str, Any],
        space: Mapping[str, Any],
        inputs: Mapping[str, str],
        local: Mapping[str, Any],
        released: _Released,
        text: str,
        work: float,
    ) -> dict[str, str]:
        """Add the probes of an adaptive attacker's search on one released model; return them by role."""
        count, at_once = attack.search.probes, attack.search.at_once
        wanted = attack.search.metric or search.judge(self.suite.metrics)
        metric = next(m for m in self.metrics if m.name == wanted)
        available = described["budget"]["images"] or concept.count("attack")
        sampling = {k: v for k, v in self.sampling.items() if k != "images_per_prompt"}
        shared = {
            **described,
            "space": dict(space),
            "search": search.VERSION,
            "held_out": max(1, available // HELD_OUT),
            "prompts": [concept.words.renamed(e.prompt, called) for e in concept.probes],
            "descriptions": [e.description for e in concept.probes],
            "sampling": sampling,
            "metric": {"component": metric.component, "parameters": metric.parameters},
        }
        new = search.explored(count)
        probes: dict[str, str] = {}

        def add(index: int, told: dict[str, str], which: dict[str, int], seed: int) -> None:
            label = f"probe {index + 1} of {count}: {text}"
            probes[f"probe.{index}"] = self.add(
                kind="probe",
                component=registry.component(registry.get("attack", attack.method)),
                parameters={**shared, **which},
                inputs={**inputs, **told},
                data={},
                local={"parameters": dict(local), "metric": metric.local},
                seed=seed,
                label=label,
                work=work + len(shared["prompts"]) * search.IMAGES * sampling["steps"] * 2.0,
            )
            self.unit(label, [probes[f"probe.{index}"]])

        for first in range(0, new, at_once):
            told = dict(probes)
            for index in range(first, min(first + at_once, new)):
                add(index, told, {"place": index - first}, seeds.derive("search", released.seed, concept.name))
        told = dict(probes)
        for place in range(count - new):
            pair = place // 2 + 1  # both of a pair under one seed, so that they differ in their settings alone
            add(new + place, told, {"repeat": place}, seeds.derive("search", released.seed, concept.name, pair))
        return probes

    def _trial(
        self,
        released: _Released,
        concept: str,
        role: str,
        steps: tuple[int, ...],
        sample: str,
        scores: Mapping[str, str],
        attack: AttackSpec | None = None,
    ) -> None:
        self.result.trials.append(
            Trial(
                task=released.task,
                defense=released.defense,
                method=released.method,
                profile=released.profile,
                protected=released.protected,
                attack=attack.name if attack else "",
                attacker=attack.attacker if attack else "",
                concept=concept,
                role=role,
                seed=released.seed,
                steps=steps,
                sample=sample,
                scores=scores,
                probes=attack.search.probes if attack and attack.search else 0,
                is_weak=released.is_weak,
                released=released.weights.get("immunize", ""),
            )
        )
