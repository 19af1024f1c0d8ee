"""From a suite to a graph of stages. Pure: the same suite gives the same plan, and nothing is read but the suite.

A trial of the grid is (task, defense, protected set, attack, concept, seed). Most of its work is shared: stages are
content-addressed, so two trials that need the same stage name the same key, and it is done once. What varies last is
done together: an adaptation, the images sampled from its trajectory and their scores form one *unit*, which is what an
executor hands to a worker; the stages of a unit are committed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness import digests, parameters, registry, search, seeds
from harness.concepts import PRIOR, SPLITS, Concept
from harness.identity import Stage, canonical_json, digest_of_file, digest_of_json, key
from harness.model_source import ModelSource
from harness.suite import AttackSpec, LoadedSuite, TaskSpec

if TYPE_CHECKING:
    from defenses.base import Defense

HELD_OUT = 3
"""An adaptive attacker judges probes on one in so many of its own images."""


@dataclass(frozen=True)
class Trial:
    """One row group of the table: where its images and scores come from."""

    task: str
    defense: str  # label in the suite; "original" is the model before it was erased
    method: str
    profile: str
    protected: tuple[str, ...]
    attack: str
    attacker: str
    concept: str
    role: str  # target | innocent | utility | real (the attack split itself, scored as if drawn) | floor (another's)
    seed: int
    steps: tuple[int, ...]  # 0: before the attack
    sample: str  # key of the sample stage; of the images stage for role "real"
    scores: Mapping[str, str]  # metric label -> key of the score stage
    probes: int = 0  # how often an adaptive attacker tried before
    is_weak: bool = False  # the defense was made weak on purpose
    released: str = ""  # key of the defense's stage; "" where there is none


@dataclass(frozen=True)
class Unit:
    """Stages that one worker does in a row, each committed by itself."""

    name: str
    stages: tuple[str, ...]
    needs: frozenset[str]  # keys of stages of other units


@dataclass
class Plan:
    """The graph: stages by key, units in an order that respects their needs, and the trials they serve."""

    suite: str
    stages: dict[str, Stage] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


def make(loaded: LoadedSuite) -> Plan:
    """Return the plan of a checked suite."""
    return _Planner(loaded).plan()


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


@dataclass(frozen=True)
class _Metric:
    """A metric of the suite."""

    name: str  # label in the suite
    cls: type
    component: str
    parameters: Mapping[str, Any]  # for the identity
    local: Mapping[str, Any]  # those for this machine


class _Planner:
    """Builds one plan; every method adds stages and returns their keys."""

    def __init__(self, loaded: LoadedSuite):
        self.loaded = loaded
        self.suite = loaded.suite
        self.concepts: dict[str, Concept] = loaded.concepts
        self.model: ModelSource = loaded.model
        self.result = Plan(self.suite.name)
        self._units: dict[tuple[str, ...], Unit] = {}
        self._images: dict[str, str] = {}
        # by the parameters' object, which is kept: a freed one's number is given to another
        self._identities: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        self._shared: dict[tuple, tuple[dict[str, Any], str]] = {}  # parameters of many stages, with their JSON
        self.metrics: list[_Metric] = []
        for index, spec in enumerate(self.suite.metrics):
            cls, values = registry.get("metric", spec.method), loaded.parameters["metrics", str(index)]
            self.metrics.append(_Metric(spec.name, cls, registry.component(cls), *self._identified(cls, values)))
        self.sampling = self.suite.sampling.model_dump()

    # -- stages ------------------------------------------------------------------------------------------

    def _identified(self, cls: type, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (parameters for the identity, local parameters): what lies in files is known by its content."""
        if id(values) not in self._identities:
            self._identities[id(values)] = (values, *self._identify(cls, values))
        return self._identities[id(values)][1:]

    @staticmethod
    def _identify(cls: type, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        identity = parameters.as_json(values)
        local = {name: identity[name] for name in cls.files(values)}
        for name, path in cls.files(values).items():
            content = digests.of_folder(path, None) if path.is_dir() else digest_of_file(path)
            identity[name] = f"sha256:{content}"
        return identity, local

    def _share(self, *name: Any, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
        """Return parameters that many stages have in common, and their JSON: made once."""
        if name not in self._shared:
            made = make()
            self._shared[name] = made, canonical_json(made)
        return self._shared[name]

    def _add(self, *, parameters_json: str | None = None, **fields: Any) -> str:
        stage = Stage(model=fields.pop("model", self.model.identity), precision=self.suite.model.precision,
                      **fields)  # fmt: skip
        k = key(stage, parameters_json)
        self.result.stages.setdefault(k, stage)
        return k

    def _unit(self, name: str, stages: Iterable[str]) -> None:
        """Group stages into a unit unless an equal one exists; a stage belongs to the first unit that names it."""
        members = tuple(dict.fromkeys(stages))
        if members in self._units:
            return
        needs = {
            upstream
            for member in members
            for upstream in self.result.stages[member].inputs.values()
            if upstream not in members
        }
        self._units[members] = Unit(name, members, frozenset(needs))

    def images(self, name: str) -> str:
        """Add the stage that lays out the images of a concept, one folder a split."""
        if name in self._images:
            return self._images[name]
        concept = self.concepts[name]
        if concept.source == "generated":
            prompts = {s: list(concept.prompts[s]) for s in SPLITS}
            k = self._drawn(prompts, seeds.derive("images", self.suite.images.seed, name), f"images of {name}")
        else:
            k = self._add(
                kind="images",
                component="images@1",
                parameters={"count": {s: len(concept.images[s]) for s in SPLITS}},
                model={},
                inputs={},
                data={"images": concept.digest},
                seed=None,
                label=f"images of {name}",
                local={
                    "source": concept.source,
                    "folder": concept.folder,
                    "images": {s: list(concept.images[s]) for s in SPLITS},
                },
            )
        self._images[name] = k
        self._unit(f"images of {name}", [k])
        return k

    def _drawn(self, prompts: Mapping[str, list[str]], seed: int, label: str) -> str:
        """Add a stage in which the base model draws an image for each prompt, one folder a key of `prompts`."""
        return self._add(
            kind="images",
            component="images@1",
            parameters={
                "prompts": dict(prompts),
                # one image a prompt, however many are evaluated
                "sampling": {k: v for k, v in self.sampling.items() if k != "images_per_prompt"},
            },
            inputs={},
            data={},
            seed=seed,
            label=label,
            work=sum(len(p) for p in prompts.values()) * self.suite.sampling.steps * 2.0,
        )

    def prior_images(self, concept: Concept, count: int) -> str:
        """Add the stage that draws `count` images of a concept's class; concepts of the same class share it."""
        label = f"{count} class images, {', '.join(concept.class_prompts[:2])}"
        label += ", ..." if len(concept.class_prompts) > 2 else ""
        # not named by the concept, and not by the count: fewer images are the first of more
        seed = seeds.derive("images", self.suite.images.seed, PRIOR, digest_of_json(concept.class_prompts))
        k = self._drawn({PRIOR: _cycled(concept.class_prompts, count)}, seed, label)
        self._unit(label, [k])
        return k

    def _protective(
        self,
        kind: str,
        cls: type[Defense],
        called: str,
        values: Any,
        targets: tuple[str, ...],
        preserve: tuple[str, ...],
        seed: int,
        erased: str | None,
    ) -> str:
        """Add an erase, prepare or immunize stage; what the method does not use does not enter its identity."""
        inputs = {"erase": erased} if erased else {}
        prepared = cls.preparation(values)
        if prepared is not None:
            inputs["prepared"] = self._protective(
                "prepare", type(prepared), prepared.name, prepared.parameters, targets, preserve, seed, erased
            )
        prior = cls.prior_images(values)
        described: dict[str, list] = {}
        for role, names in (("targets", targets), ("preserved", preserve)):
            if role not in cls.uses:
                continue
            described[role] = []
            for index, name in enumerate(names):
                concept = self.concepts[name]
                entry: dict[str, Any] = {"kind": concept.kind, "phrase": concept.phrase}
                if "images" in cls.uses:
                    entry["captions"] = list(concept.captions["defense"])
                    inputs[f"{role}.{index}"] = self.images(name)
                if role == "targets" and prior:
                    entry["prior_captions"] = _cycled(concept.class_prompts, prior)
                    inputs[f"prior.{index}"] = self.prior_images(concept, prior)
                described[role].append(entry)
        label = f"{kind} {called}" + (f" for {', '.join(targets)}" if "targets" in cls.uses else "")
        label += f", seed {seed}" if "seed" in cls.uses else ""
        label += ", erased before" if erased else ""
        identity, local = self._identified(cls, values)
        k = self._add(
            kind=kind,
            component=registry.component(cls),
            parameters={"parameters": identity, **described},
            inputs=inputs,
            data={},
            local={"parameters": local} if local else {},
            seed=seeds.derive("defense", seed) if "seed" in cls.uses else None,
            label=label,
            work=float(cls.unet_passes(values, len(targets))),
            workers=self.suite.resources.workers if cls.can_shard else 1,
        )
        self._unit(label, [k])
        return k

    def _sample(
        self,
        concept: Concept,
        seed: int,
        steps: tuple[int, ...],
        inputs: Mapping[str, str],
        label: str,
        called: str | None = None,
        liberties: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Add a stage that draws the evaluation images; `called`: what the model was taught to call the concept.

        `liberties`: what an adaptive attacker takes: components restored, the publisher's hooks left out.
        """
        called = concept.words.name if called is None else called
        images = len(concept.evaluations) * self.suite.sampling.images_per_prompt * len(steps)
        described, described_json = self._share(
            "sample", concept.name, called, steps, canonical_json(dict(liberties)),
            make=lambda: {
                "prompts": [concept.words.renamed(e.prompt, called) for e in concept.evaluations],
                "steps": list(steps),
                "sampling": self.sampling,
                **liberties,
            },
        )  # fmt: skip
        return self._add(
            kind="sample",
            component="sample@1",
            parameters=described,
            parameters_json=described_json,
            inputs=inputs,
            data={},
            seed=seeds.derive("sampling", seed, concept.name),
            label=label,
            work=images * self.suite.sampling.steps * 2.0,
        )

    def _scores(
        self,
        concept: Concept,
        generated: Mapping[str, str],
        label: str,
        descriptions: tuple[str, ...] | None = None,
        images: int | None = None,
    ) -> dict[str, str]:
        """Score images against the references of a concept; `descriptions` are those of its prompts unless given.

        `images`: on so many of the attack split the attack trained, where that is not all of it.
        """
        descriptions = descriptions or tuple(e.description for e in concept.evaluations)
        scores = {}
        for metric in self.metrics:
            cut = {"images": images} if images and metric.cls.compares_with == "attack" else {}

            def describe(metric=metric, cut=cut) -> dict[str, Any]:
                return {"parameters": metric.parameters, "descriptions": list(descriptions), **cut}

            described, described_json = self._share(
                "score", metric.name, concept.name, descriptions, *cut.values(), make=describe
            )
            scores[metric.name] = self._add(
                kind="score",
                component=metric.component,
                parameters=described,
                parameters_json=described_json,
                model={},
                inputs={**generated, "references": self._references(concept, metric)},
                data={},
                seed=None,
                label=f"{metric.name} of {label}",
                local={"parameters": metric.local} if metric.local else {},
            )
        return scores

    def _references(self, concept: Concept, metric: _Metric) -> str:
        """Add what a metric compares images of a concept with: its images, or their features."""
        images = self.images(concept.name)
        cls = metric.cls
        if cls.encoder is None:
            return images
        split = cls.compares_with
        k = self._add(
            kind="features",
            component=cls.encoder,
            parameters={"parameters": {n: metric.parameters[n] for n in cls.encoder_parameters}, "split": split},
            model={},
            inputs={"images": images},
            data={},
            seed=None,
            label=f"features of {concept.name} ({split}) for {metric.name}",
            # any metric of the encoder gives the same
            local={
                "metric": {"component": metric.component, "parameters": dict(metric.parameters)},
                "parameters": dict(metric.local),
            },
        )
        self._unit(self.result.stages[k].label, [k])
        return k

    # -- trials ------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        suite = self.suite
        for task_name, task in suite.tasks.items():
            for together in task.targets:
                self._protected_set(task_name, task, tuple(together))
        self.result.units = list(self._units.values())
        _order(self.result)
        return self.result

    def _protected_set(self, task_name: str, task: TaskSpec, targets: tuple[str, ...]) -> None:
        """Add all trials of one protected set: every defense, attack, concept and seed."""
        suite, loaded = self.suite, self.loaded
        preserve = tuple(task.preserve)
        erased = None
        if task.erase is not None:
            values = loaded.parameters["tasks", task_name, "erase"]
            eraser = registry.get("defense", task.erase.method)
            erased = self._protective(
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
                immunized = self._protective("immunize", cls, spec.name, values, given, preserve, seed, erased)
                over = {"erase": erased} if erased else {}
                undefended = None
                if not cls.threat_model.changes:
                    none = registry.get("defense", "none")
                    nothing = self._protective(
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
        scores = self._scores(concept, {"images": images}, f"real images of {name}", concept.descriptions)
        self._unit(f"score real images of {name}", scores.values())
        self._trial(nothing, name, "real", (0,), images, scores)

    def _floor(self, nothing: _Released, name: str, other: str) -> None:
        """Add the scores that images of another concept get: what a model that draws something else would have."""
        concept, images = self.concepts[name], self.images(other)
        words = tuple(e.description for e in concept.evaluations)
        descriptions = tuple(words[i % len(words)] for i in range(self.concepts[other].count("attack")))
        text = f"images of {other} as if of {name}"
        scores = self._scores(concept, {"images": images}, text, descriptions)
        self._unit(f"score {text}", scores.values())
        self._trial(nothing, name, "floor", (0,), images, scores)

    def _before(self, released: _Released, name: str, role: str) -> None:
        """Add what the released model draws before any attack (step 0)."""
        concept = self.concepts[name]
        text = f"{name} before the attack ({released.label})"
        sample = self._sample(concept, released.seed, (0,), released.met_by(None), f"sample {text}")
        scores = self._scores(concept, {"sample": sample}, text)
        self._unit(f"sample {text}", [sample, *scores.values()])
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
        identity, local = self._identified(cls, values)
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
                known["prior_captions"] = _cycled(concept.class_prompts, prior)
            return {
                "parameters": identity,
                "budget": {"steps": list(steps), "batch_size": batch_size, "images": attack.images},
                "attacker": attack.attacker,
                "concept": known,
                **restored,
            }

        described, described_json = self._share("adapt", attack_index, name, make=describe)
        weights = released.met_by(attack)
        inputs = {**weights, "images": self.images(name)}
        if prior:
            inputs["prior"] = self.prior_images(concept, prior)
        work = float(steps[-1] * batch_size * cls.passes_an_example(values))
        workers = self.suite.resources.workers
        if attack.search is not None:
            inputs |= self._probes(attack, concept, called, described, space, inputs, local, released, text, work)
        adapt = self._add(
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
        sample = self._sample(concept, released.seed, steps, inputs, f"sample {text}", called, liberties)
        scores = self._scores(concept, {"sample": sample}, text, images=attack.images)
        self._unit(text, [adapt, sample, *scores.values()])
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
            probes[f"probe.{index}"] = self._add(
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
            self._unit(label, [probes[f"probe.{index}"]])

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


def _cycled(prompts: Sequence[str], count: int) -> list[str]:
    """Return `count` prompts, those given coming round."""
    return [prompts[i % len(prompts)] for i in range(count)]


def _order(plan: Plan) -> None:
    """Give each stage to one unit and sort the units so that what is needed comes first."""
    owner: dict[str, int] = {}
    units: list[Unit] = []
    for unit in plan.units:
        own = tuple(k for k in unit.stages if k not in owner)
        if not own:
            continue
        if own != unit.stages:
            needs = {i for k in own for i in plan.stages[k].inputs.values() if i not in own}
            unit = Unit(unit.name, own, frozenset(needs))
        owner.update(dict.fromkeys(own, len(units)))
        units.append(unit)
    depth: dict[int, int] = {}

    def depth_of(index: int) -> int:
        if index not in depth:
            depth[index] = 0
            depth[index] = max((depth_of(owner[n]) + 1 for n in units[index].needs), default=0)
        return depth[index]

    order = sorted(range(len(units)), key=lambda i: (depth_of(i), i))
    plan.units = [units[i] for i in order]
