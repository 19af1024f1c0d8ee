"""The stages of a plan: what each depends on, so what its key is made of. A method a kind of stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.core import digests, parameters, registry, seeds
from harness.core.concept import PRIOR, SPLITS, Concept
from harness.core.identity import Stage, canonical_json, digest_of_file, digest_of_json, key
from harness.model.source import ModelSource
from harness.plan.graph import Plan, Unit
from harness.suite.loaded import LoadedSuite

if TYPE_CHECKING:
    from harness.contracts.defense import Defense


@dataclass(frozen=True)
class Metric:
    """A metric of the suite."""

    name: str  # label in the suite
    cls: type
    component: str
    parameters: Mapping[str, Any]  # for the identity
    local: Mapping[str, Any]  # those for this machine


class PlanStages:
    """Adds stages to one plan; every method returns their keys."""

    def __init__(self, loaded: LoadedSuite):
        self.loaded = loaded
        self.suite = loaded.suite
        self.concepts: dict[str, Concept] = loaded.concepts
        self.model: ModelSource = loaded.model
        self.result = Plan(self.suite.name)
        self.units: dict[tuple[str, ...], Unit] = {}
        self._images: dict[str, str] = {}
        # by the parameters' object, which is kept: a freed one's number is given to another
        self._identities: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}
        self._shared: dict[tuple, tuple[dict[str, Any], str]] = {}  # parameters of many stages, with their JSON
        self.metrics: list[Metric] = []
        for index, spec in enumerate(self.suite.metrics):
            cls, values = registry.get("metric", spec.method), loaded.parameters["metrics", str(index)]
            self.metrics.append(Metric(spec.name, cls, registry.component(cls), *self.identified(cls, values)))
        self.sampling = self.suite.sampling.model_dump()

    def identified(self, cls: type, values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
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

    def share(self, *name: Any, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
        """Return parameters that many stages have in common, and their JSON: made once."""
        if name not in self._shared:
            made = make()
            self._shared[name] = made, canonical_json(made)
        return self._shared[name]

    def add(self, *, parameters_json: str | None = None, **fields: Any) -> str:
        stage = Stage(model=fields.pop("model", self.model.identity), precision=self.suite.model.precision,
                      **fields)  # fmt: skip
        k = key(stage, parameters_json)
        self.result.stages.setdefault(k, stage)
        return k

    def unit(self, name: str, stages: Iterable[str]) -> None:
        """Group stages into a unit unless an equal one exists; a stage belongs to the first unit that names it."""
        members = tuple(dict.fromkeys(stages))
        if members in self.units:
            return
        needs = {
            upstream
            for member in members
            for upstream in self.result.stages[member].inputs.values()
            if upstream not in members
        }
        self.units[members] = Unit(name, members, frozenset(needs))

    def images(self, name: str) -> str:
        """Add the stage that lays out the images of a concept, one folder a split."""
        if name in self._images:
            return self._images[name]
        concept = self.concepts[name]
        if concept.source == "generated":
            prompts = {s: list(concept.prompts[s]) for s in SPLITS}
            k = self._drawn(prompts, seeds.derive("images", self.suite.images.seed, name), f"images of {name}")
        else:
            k = self.add(
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
        self.unit(f"images of {name}", [k])
        return k

    def _drawn(self, prompts: Mapping[str, list[str]], seed: int, label: str) -> str:
        """Add a stage in which the base model draws an image for each prompt, one folder a key of `prompts`."""
        return self.add(
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
        k = self._drawn({PRIOR: cycled(concept.class_prompts, count)}, seed, label)
        self.unit(label, [k])
        return k

    def protective(
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
        used = cls.used(values)
        prepared = cls.preparation(values)
        if prepared is not None:
            inputs["prepared"] = self.protective(
                "prepare", type(prepared), prepared.name, prepared.parameters, targets, preserve, seed, erased
            )
        prior = cls.prior_images(values)
        described: dict[str, list] = {}
        for role, names in (("targets", targets), ("preserved", preserve)):
            if role not in used:
                continue
            described[role] = []
            for index, name in enumerate(names):
                concept = self.concepts[name]
                entry: dict[str, Any] = {"kind": concept.kind, "phrase": concept.phrase}
                if "images" in used:
                    entry["captions"] = list(concept.captions["defense"])
                    inputs[f"{role}.{index}"] = self.images(name)
                if role == "targets" and prior:
                    entry["prior_captions"] = cycled(concept.class_prompts, prior)
                    inputs[f"prior.{index}"] = self.prior_images(concept, prior)
                described[role].append(entry)
        label = f"{kind} {called}" + (f" for {', '.join(targets)}" if "targets" in used else "")
        label += f", seed {seed}" if "seed" in used else ""
        label += ", erased before" if erased else ""
        identity, local = self.identified(cls, values)
        k = self.add(
            kind=kind,
            component=registry.component(cls),
            parameters={"parameters": identity, **described},
            inputs=inputs,
            data={},
            local={"parameters": local} if local else {},
            seed=seeds.derive("defense", seed) if "seed" in used else None,
            label=label,
            work=float(cls.unet_passes(values, len(targets))),
            workers=self.suite.resources.workers if cls.can_shard else 1,
        )
        self.unit(label, [k])
        return k

    def sample(
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
        described, described_json = self.share(
            "sample", concept.name, called, steps, canonical_json(dict(liberties)),
            make=lambda: {
                "prompts": [concept.words.renamed(e.prompt, called) for e in concept.evaluations],
                "steps": list(steps),
                "sampling": self.sampling,
                **liberties,
            },
        )  # fmt: skip
        return self.add(
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

    def scores(
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

            described, described_json = self.share(
                "score", metric.name, concept.name, descriptions, *cut.values(), make=describe
            )
            scores[metric.name] = self.add(
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

    def _references(self, concept: Concept, metric: Metric) -> str:
        """Add what a metric compares images of a concept with: its images, or their features."""
        images = self.images(concept.name)
        cls = metric.cls
        if cls.encoder is None:
            return images
        split = cls.compares_with
        k = self.add(
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
        self.unit(self.result.stages[k].label, [k])
        return k


def cycled(prompts: Sequence[str], count: int) -> list[str]:
    """Return `count` prompts, those given coming round."""
    return [prompts[i % len(prompts)] for i in range(count)]
