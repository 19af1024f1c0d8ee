"""The builder that tasks plan with: it adds stages to one plan and sets what each depends on, and so its key.

One method for each kind of stage that several tasks share; `stage` adds any other. These methods return the key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from harness.contracts.defense import Defense
from harness.contracts.state import ModelState
from harness.core import digests, registry, seeds
from harness.core.concept import PRIOR, SPLITS, Concept
from harness.core.described import Described, as_json
from harness.core.identity import Input, Stage, digest_of_file, digest_of_json, key
from harness.core.sampling import Sampling
from harness.plan.graph import Plan, Unit
from harness.stages.features import FeaturesParameters
from harness.stages.images import ImagesParameters
from harness.stages.protect import GENERAL, PREPARED, KnownConcept, ProtectParameters
from harness.stages.sample import SampleParameters
from harness.stages.score import ScoreParameters
from harness.suite.loaded import LoadedSuite
from harness.suite.pairs import Pairs
from harness.suite.spec import MethodSpec

_NONE: Mapping[str, Any] = {}
"""Of all stages that have nothing of a kind; nobody writes into it."""


@dataclass(frozen=True, eq=False)  # hashable, by identity
class Metric:
    """A metric of the suite."""

    name: str  # label in the suite
    cls: type
    component: str
    parameters: Described  # for the identity
    local: Mapping[str, Any]  # parameters for this machine only


class Builder:
    """Adds stages to one plan; see the module."""

    def __init__(self, loaded: LoadedSuite):
        self.loaded = loaded
        self.suite = loaded.suite
        self.concepts: dict[str, Concept] = loaded.concepts
        self.plan = Plan(self.suite.name)
        self.units: dict[tuple[str, ...], Unit] = {}
        self._begun: dict[str, tuple[str, ...]] = {}  # first stage of a unit -> the key of the unit
        self._images: dict[str, str] = {}
        # keyed by id(); the object is kept so that its id is not reused
        self._identities: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        self._kinds: dict[str, tuple[str, bool]] = {}
        self._states: dict[ModelState, dict[str, Input]] = {}
        self._scoring: dict[tuple, list] = {}
        self._references: dict[tuple[Metric, str, str], str] = {}
        self._shared: dict[tuple, dict[str, Any]] = {}  # parameters that many stages have, with their digest
        given = self.suite.sampling.model_dump()
        self.sampling = Sampling(**{f.name: given[f.name] for f in fields(Sampling)})
        self.metrics: list[Metric] = [
            self.metric(spec, "metrics", index) for index, spec in enumerate(self.suite.metrics)
        ]

    def metric(self, spec: MethodSpec, *path: str | int) -> Metric:
        """Return a metric that the suite names at a path."""
        cls, values = registry.get("metric", spec.method), self.loaded.parameters[tuple(map(str, path))]
        return Metric(spec.name, cls, registry.component(cls), *self.identified(cls, values))

    def read(self, key: str) -> Input:
        """Return a planned stage as the input of another."""
        return self.plan.read(key)

    def stage(
        self,
        kind: str,
        parameters: Any,
        *,
        inputs: Mapping[str, Input],
        label: str,
        what: str = "",
        seed: int | None = None,
        component: str | None = None,
        reads_model: bool = True,
        data: Mapping[str, str] | None = None,
        local: Mapping[str, Any] | None = None,
        work: float = 0.0,
        workers: int = 1,
        parameters_digest: str | None = None,
    ) -> str:
        """Add a stage; people read `what` and `label`.

        `component`: the method that does it; None: the kind itself. A kind that is not bundled is added to a method's,
        since its code changes the result too. `seed` None: the result does not depend on chance.
        `reads_model`: whether the base model is part of the identity. `data`: digests of files that no stage made,
        `local`: where they are on this machine. `work`: UNet sample passes, a backward pass counts as two. `workers`:
        how many processes may share it. `parameters_digest`: of the parameters' JSON, where it is known.
        """
        own, is_outside = self._kind(kind)
        if component is None:
            component = own
        elif is_outside:
            component = f"{component}/{own}"
        added = Stage(
            kind=kind,
            component=component,
            parameters=parameters,
            inputs=inputs,
            model=self.loaded.model.identity if reads_model else _NONE,
            data=data or _NONE,
            seed=seed,
            precision=self.suite.model.computes_in,
            label=label,
            what=what,
            local=local or _NONE,
            workers=workers,
            work=work,
        )
        k = key(added, parameters_digest)
        self.plan.stages.setdefault(k, added)
        return k

    def _kind(self, kind: str) -> tuple[str, bool]:
        """Return the component of a kind of stage, and whether the kind is not bundled."""
        if kind not in self._kinds:
            cls = registry.get("stage", kind)
            self._kinds[kind] = registry.component(cls), registry.is_outside(cls)
        return self._kinds[kind]

    def inputs_of(self, state: ModelState) -> dict[str, Input]:
        """Return role -> layer for a stage that works on a state; as `ModelState.inputs`, found once for each state."""
        if state not in self._states:
            self._states[state] = state.inputs()
        return dict(self._states[state])

    def unit(self, name: str, stages: Iterable[str]) -> None:
        """Group stages into a unit unless an equal one exists; a stage belongs to the first unit that names it."""
        members = tuple(dict.fromkeys(stages))
        if members not in self.units:
            self.units[members] = self._unit(name, members)
            self._begun.setdefault(members[0], members)

    def unit_with(self, name: str, first: str, stages: Iterable[str]) -> None:
        """Add stages to the unit that begins with the stage `first`, or make it.

        So one worker does all that reads the first: the large files of an adaptation are deleted after its unit.
        """
        members = self._begun.setdefault(first, (first,))
        known = self.units.get(members, Unit(name, members, ()))
        # under the same key: an equal unit that is asked for later is in it
        self.units[members] = self._unit(known.name, tuple(dict.fromkeys([*known.stages, *stages])))

    def _unit(self, name: str, members: tuple[str, ...]) -> Unit:
        reads = {read.key: None for member in members for read in self.plan.stages[member].inputs.values()}
        return Unit(name, members, tuple(key for key in reads if key not in members))

    def share(self, *name: Any, make: Callable[[], Any]) -> dict[str, Any]:
        """Return parameters that many stages share, with their digest, as arguments of `stage`; they are made once."""
        found = self._shared.get(name)
        if found is None:
            made = make()
            found = self._shared[name] = {"parameters": made, "parameters_digest": digest_of_json(as_json(made))}
        return found

    def identified(self, cls: type, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return (parameters for the identity, local parameters): files are identified by their content."""
        if id(values) not in self._identities:
            self._identities[id(values)] = (values, *_identify(cls, values))
        return self._identities[id(values)][1:]

    # -- images ------------------------------------------------------------------------------------------

    def images(self, name: str) -> str:
        """Add the stage that lays out the images of a concept, one folder per split."""
        if name in self._images:
            return self._images[name]
        k = self._images[name] = self._laid_out(self.concepts[name], SPLITS, f"images of {name}")
        return k

    def general_images(self) -> str:
        """Add the stage that lays out the suite's general images, all of them in the split `attack`."""
        return self._laid_out(self.loaded.general, ("attack",), "general images")

    def _laid_out(self, concept: Concept, splits: Sequence[str], label: str) -> str:
        """Add the stage of a concept's images: drawn by the base model, or copied."""
        if concept.source == "generated":
            prompts = {s: concept.prompts[s] for s in splits}
            k = self._drawn(prompts, seeds.derive("images", self.suite.images.seed, concept.name), label)
        else:
            k = self.stage(
                "images",
                ImagesParameters(count={s: len(concept.images[s]) for s in SPLITS}),
                reads_model=False,
                inputs={},
                data={"images": concept.digest},
                label=label,
                local={
                    "source": concept.source,
                    "folder": concept.folder,
                    "images": {s: list(concept.images[s]) for s in SPLITS},
                    "digests": {s: list(concept.files.get(s, ())) for s in SPLITS},
                },
            )
        self.unit(label, [k])
        return k

    def _drawn(self, prompts: Mapping[str, Sequence[str]], seed: int, label: str) -> str:
        """Add a stage in which the base model draws an image for each prompt, one folder per key of `prompts`."""
        return self.stage(
            "images",
            # one image per prompt, however many are evaluated
            ImagesParameters({split: tuple(own) for split, own in prompts.items()}, self.sampling.alone),
            inputs={},
            seed=seed,
            label=label,
            work=sum(len(p) for p in prompts.values()) * self.sampling.passes_an_image,
        )

    def prior_images(self, concept: Concept, count: int) -> str:
        """Add the stage that draws `count` images of a concept's class; concepts of the same class share it."""
        label = f"{count} class images, {', '.join(concept.class_prompts[:2])}"
        label += ", ..." if len(concept.class_prompts) > 2 else ""
        # the seed depends neither on the concept nor on the count: fewer images are the first of more
        seed = seeds.derive("images", self.suite.images.seed, PRIOR, digest_of_json(concept.class_prompts))
        k = self._drawn({PRIOR: cycled(concept.class_prompts, count)}, seed, label)
        self.unit(label, [k])
        return k

    def drawn_general(self, prompts: Sequence[str]) -> str:
        """Add the stage that draws an image for each general prompt; all who ask for the same share it."""
        label = f"{len(prompts)} general images, {', '.join(prompts[:2])}" + (", ..." if len(prompts) > 2 else "")
        seed = seeds.derive("images", self.suite.images.seed, GENERAL)
        k = self._drawn({PRIOR: tuple(prompts)}, seed, label)
        self.unit(label, [k])
        return k

    # -- releases ----------------------------------------------------------------------------------------

    def release(
        self,
        kind: str,
        defense: Defense,
        called: str,
        targets: Sequence[str],
        preserve: Sequence[str],
        seed: int,
        over: ModelState,
        pairs: Pairs | None = None,
        setting: Mapping[str, Input] = _NONE,
    ) -> str:
        """Add a stage in which a defense works on a state of the model, as eraser or immunizer (`kind`).

        `called`: its label in the suite. `pairs`: general images, for a method that uses them; raises ValueError if it
        does and there are none. `setting`: role -> the stage that proposed or chose other values of its parameters.
        Only what the method uses enters the identity.
        """
        cls, values = type(defense), defense.parameters
        inputs = {**over.inputs(), **setting}
        used = cls.used(values)
        prepared = cls.preparation(values)
        if prepared is not None:
            done = self.release("prepare", prepared, prepared.name, targets, preserve, seed, over)
            inputs[PREPARED] = self.read(done)
        known = {}
        for role, names in (("targets", targets), ("preserved", preserve)):
            if role in used:
                known[role], read = self._known(role, names, used, cls.prior_images(values))
                inputs |= read
        prompts = tuple(cls.general_prompts(values))
        if prompts:
            known["general"] = prompts
            inputs[GENERAL] = self.read(self.drawn_general(prompts))
        label = f"{kind} {called}" + (f" for {', '.join(targets)}" if "targets" in used else "")
        label += f", seed {seed}" if "seed" in used else ""
        label += _below(over)
        if not (used or cls.threat_model.changes or cls.threat_model.must_honour):
            label = "release the erased model unchanged" if over.layers else "release the model unchanged"
        identity, local = self.identified(cls, values)
        own_local: dict[str, Any] = {"parameters": local} if local else {}
        data = {}
        if "pairs" in used:
            if pairs is None:
                raise ValueError(f"{called} trains on general images with captions, and this task has none")
            data["pairs"], own_local["pairs"] = pairs.digest, pairs.local
        k = self.stage(
            kind,
            ProtectParameters(identity, **known),
            component=registry.component(cls),
            inputs=inputs,
            data=data,
            local=own_local,
            seed=seeds.derive("defense", seed) if "seed" in used else None,
            label=label,
            work=float(cls.unet_passes(values, len(targets))),
            workers=self.suite.resources.workers if cls.can_shard else 1,
        )
        self.unit(label, [k])
        return k

    def _known(
        self, role: str, names: Sequence[str], used: frozenset[str], prior: int
    ) -> tuple[tuple[KnownConcept, ...], dict[str, Input]]:
        """Return the concepts as a defense knows them, and the stages with the images that it reads."""
        found, inputs = [], {}
        for index, name in enumerate(names):
            concept = self.concepts[name]
            captions = prior_captions = None
            if "images" in used:
                captions = concept.captions["defense"]
                inputs[f"{role}.{index}"] = self.read(self.images(name))
            if role == "targets" and prior:
                prior_captions = cycled(concept.class_prompts, prior)
                inputs[f"prior.{index}"] = self.read(self.prior_images(concept, prior))
            found.append(KnownConcept(concept.kind, concept.phrase, captions, prior_captions))
        return tuple(found), inputs

    # -- drawn images and their scores -------------------------------------------------------------------

    def sample(
        self,
        concept: Concept,
        seed: int,
        steps: tuple[int, ...],
        inputs: Mapping[str, Input],
        label: str,
        *,
        called: str | None = None,
        restore: tuple[str, ...] = (),
        attacker: str | None = None,
        rounded_to: str | None = None,
    ) -> str:
        """Add a stage that draws the evaluation images; `called`: the name that the model was taught for the concept.

        `restore`: components that an adaptive attacker puts back; `attacker`: "adaptive", or None if honest;
        `rounded_to`: what the attacker rounds the released weights to.
        """
        called = concept.words.name if called is None else called
        images = len(concept.evaluations) * self.suite.sampling.images_per_prompt * len(steps)
        shared = self.share(
            "sample", concept.name, called, steps, restore, attacker, rounded_to,
            make=lambda: SampleParameters(
                tuple(concept.words.renamed(e.prompt, called) for e in concept.evaluations),
                steps,
                self.sampling,
                restore or None,
                attacker,
                rounded_to,
            ),
        )  # fmt: skip
        return self.stage(
            "sample",
            **shared,
            inputs=inputs,
            seed=seeds.derive("sampling", seed, concept.name),
            label=label,
            what="sample",
            work=images * self.sampling.passes_an_image,
        )

    def scores(
        self,
        concept: Concept,
        generated: Mapping[str, Input],
        label: str,
        descriptions: tuple[str, ...] | None = None,
        images: int | None = None,
        is_taught: bool = True,
        only: Collection[str] | None = None,
    ) -> dict[str, str]:
        """Score images against the references of a concept; `descriptions`: by default those of its prompts.

        `images`: how many images of the attack split the attack trained on, if not all. `is_taught`: whether it trained
        on any; else no metric compares with them. `only`: labels of the metrics; None: all.
        """
        place = concept.name, descriptions, images
        if place not in self._scoring:
            said = descriptions or tuple(e.description for e in concept.evaluations)
            own = self.images(concept.name)
            trained = {metric.name: images if metric.cls.compares_with == "attack" else None for metric in self.metrics}
            self._scoring[place] = [
                (metric, self._scored(metric, own, concept.name, said, trained[metric.name])) for metric in self.metrics
            ]
        return {
            metric.name: self.stage("score", inputs={**generated, **references}, label=label, **fixed)
            for metric, (fixed, references) in self._scoring[place]
            if (is_taught or metric.cls.compares_with != "attack") and (only is None or metric.name in only)
        }

    def score(
        self,
        metric: Metric,
        generated: Mapping[str, Input],
        images: str,
        called: str,
        descriptions: tuple[str, ...],
        label: str,
        trained: int | None = None,
    ) -> str:
        """Add a stage that scores images; `images`: key of a stage whose folder holds the references, by split.

        `called`: a name for these references. `trained`: how many of them the attack trained on, if not all.
        """
        fixed, references = self._scored(metric, images, called, descriptions, trained)
        return self.stage("score", inputs={**generated, **references}, label=label, **fixed)

    def _scored(
        self, metric: Metric, images: str, called: str, descriptions: tuple[str, ...], trained: int | None
    ) -> tuple[dict[str, Any], dict[str, Input]]:
        """Return what scores of many images share: arguments of `stage`, and the references as an input."""
        shared = self.share(
            "score", metric, called, descriptions, trained or 0,
            make=lambda: ScoreParameters(metric.parameters, descriptions, trained or None),
        )  # fmt: skip
        fixed = {
            **shared, "what": f"{metric.name} of", "component": metric.component, "reads_model": False,
            "local": {"parameters": metric.local} if metric.local else _NONE,
        }  # fmt: skip
        return fixed, {"references": self.read(self.references(metric, images, called))}

    def references(self, metric: Metric, images: str, called: str, split: str | None = None) -> str:
        """Add the stage of a metric's references: the images of a stage, or their features.

        `split`: the folder of the images; None: the one that the metric compares with.
        """
        cls = metric.cls
        split = split or cls.compares_with
        if cls.encoder is None:
            return images
        place = metric, images, split
        if place in self._references:
            return self._references[place]
        k = self._references[place] = self.stage(
            "features",
            FeaturesParameters({n: metric.parameters[n] for n in cls.encoder_parameters}, split),
            component=registry.encoder(cls),
            reads_model=False,
            inputs={"images": self.read(images)},
            label=f"features of {called} ({split}) for {metric.name}",
            # every metric with this encoder gives the same features
            local={
                "metric": {"component": metric.component, "parameters": dict(metric.parameters)},
                "parameters": dict(metric.local),
            },
        )
        self.unit(self.plan.stages[k].label, [k])
        return k


def _below(over: ModelState) -> str:
    """Return what a defense works on, if it is not the base model, in words for a label."""
    if not over.layers:
        return ""
    return ", on the erased model" if over.layers[-1].kind == "erase" else f", after {over.layers[-1].kind}"


def _identify(cls: type, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    identity, local = as_json(values), {}
    for name, path in cls.files(values).items():
        content = digests.of_folder(path, None) if path.is_dir() else digest_of_file(path)
        first, *inner = name.split(".")
        local[first] = as_json(getattr(values, first))
        holder = identity
        for outer in (first, *inner)[:-1]:
            holder = holder[outer]
        holder[(first, *inner)[-1]] = f"sha256:{content}"
    return identity, local


def cycled(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """Return `count` prompts, repeating the given ones in order."""
    return tuple(prompts[i % len(prompts)] for i in range(count))
