"""Memorization: which prompts make a model replay a training image, which tokens do it, and what helps against it.

Wen, Liu, Chen and Lyu (ICLR 2024): detect from the noise predictions, explain by their gradient, mitigate at inference
and in training. A model that memorizes is made here (`memorize`), or the base model has memorized in pre-training
(`memorized`). Four parts, each with its rows:

    replay       images drawn for memorized prompts and for others, by the base and by the memorizing model
    detection    a score for each prompt by each detector, memorized prompts against each set of negatives
    explanation  the significance of each token
    mitigation   images drawn under each mitigation, with the same starting noise for all

One memorizing model serves all seeds of the suite: seeds are of starting noise. So intervals cover chance in drawing
and in prompts, not in training.

Differences from the released code (YuxinWenRick/diffusion_memorization): every mitigation meets the same starting noise
(there the optimized prompts alone have a seed for each prompt); detection is computed in the suite's precision, fp32 if
not stated (there fp16).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.state import ModelState
from harness.contracts.table import Figure, Section, Table
from harness.contracts.task import Label, Measurement, Task
from harness.core import registry, seeds
from harness.core.registry import register
from harness.plan.builder import Builder, Metric
from harness.stages.detect import DetectParameters
from harness.stages.explain import ExplainParameters
from harness.stages.memorize import MemorizeParameters
from harness.stages.originals import OriginalsParameters
from harness.stages.own_similarity import OwnSimilarityParameters
from harness.stages.replay import ReplayParameters
from harness.suite.loaded import LoadedSuite, Mistake
from harness.suite.spec import MethodSpec
from harness.tasks import memorization_checks
from harness.tasks.memorization_data import Prompts, PromptSet
from harness.tasks.memorization_form import MemorizationSpec

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.contracts.diagnostic import MeasuredRun

REPLAY, DETECTION, EXPLANATION, MITIGATION = "replay", "detection", "explanation", "mitigation"
"""The parts, as the column `part` of the rows names them."""
BASE, NONE = "base", "none"
"""Labels of the model before it memorized, and of the memorizing model without mitigation."""
INFERENCE, TRAINING = "inference", "training"
"""When a mitigation works."""


@register("task")
class Memorization(Task):
    """Measure memorization, its detection, its explanation and its mitigation."""

    name = "memorization"
    version = 1
    Spec = MemorizationSpec

    @classmethod
    def check(cls, loaded: LoadedSuite, entries: Mapping[str, MemorizationSpec]) -> list[Mistake]:
        """Return mistakes in methods and sampling."""
        return memorization_checks.before_concepts(loaded, entries)

    @classmethod
    def check_concepts(cls, loaded: LoadedSuite, entries: Mapping[str, MemorizationSpec]) -> list[Mistake]:
        """Read prompts and images; return what does not fit them."""
        return memorization_checks.after_concepts(loaded, entries)

    @classmethod
    def count(cls, loaded: LoadedSuite, name: str, spec: MemorizationSpec) -> int:
        """Return the number of detectors' and mitigations' cells."""
        cells = len(spec.detectors) * (1 + len(spec.negatives)) + 2 * (2 + len(spec.mitigations) + len(spec.trained))
        return cells * len(loaded.suite.seeds or ())

    def tables(self, run: MeasuredRun, rows: DataFrame) -> Iterator[Table | Figure]:
        """Yield detection, mitigation, replay and tokens, with their pictures."""
        from harness.tasks import memorization_tables

        return memorization_tables.of(run, rows)

    def shown(self, made: Sequence[Table | Figure]) -> list[Section]:
        """Return the sections of all tables but the tokens'."""
        from harness.tasks import memorization_tables

        return memorization_tables.shown(made)

    def plan(self, name: str, spec: MemorizationSpec, build: Builder) -> Iterator[Measurement]:
        """Yield the measurements, one seed after the other."""
        return _Plan(name, spec, build).measurements()


@dataclass(frozen=True)
class _Model:
    """A model that images are drawn from."""

    label: str
    method: str
    when: str  # "", INFERENCE or TRAINING
    setting: str
    state: ModelState


class _Plan:
    """The measurements of one entry."""

    def __init__(self, name: str, spec: MemorizationSpec, build: Builder):
        self.name, self.spec, self.build = name, spec, build
        self.found: Prompts = build.loaded.found[name]
        self.unplanted = self.found.unplanted(spec) if spec.mitigated or spec.memorize or spec.quality else None
        self.similarity = self._metric(spec.similarity, "similarity")
        self.alignment = self._metric(spec.alignment, "alignment")
        self.quality = [self._metric(own, "quality", index) for index, own in enumerate(spec.quality)]
        self.originals = {own.name: self._originals(own) for own in self._sets() if own.originals is not None}

    def _sets(self) -> list[PromptSet]:
        """Return the prompts that images are drawn for under each mitigation."""
        return [self.found.memorized] + ([self.unplanted] if self.unplanted is not None else [])

    def _metric(self, spec: MethodSpec | None, *path: str | int) -> Metric | None:
        return None if spec is None else self.build.metric(spec, "tasks", self.name, *path)

    def measurements(self) -> Iterator[Measurement]:
        """Yield them: the models, then what is detected and explained."""
        models = self._models()
        memorizing = next(model for model in models if model.label == NONE)
        for seed in self.build.suite.seeds:
            for model in models:
                for own in self._sets():
                    yield from self._drawn(model, own, seed)
            if self.spec.detectors:
                yield from self._detected(memorizing, seed)
            if self.spec.explain is not None:
                yield from self._explained(memorizing, seed)

    # -- models ------------------------------------------------------------------------------------------

    def _models(self) -> list[_Model]:
        """Return the models in the order of the table."""
        base, models = ModelState(), []
        memorizing = base
        if self.spec.memorize is not None:
            models.append(_Model(BASE, "", "", "", base))
            memorizing = self._memorized(base, "the base model")
        models.append(_Model(NONE, "none", "", "", memorizing))
        for index, spec in enumerate(self.spec.trained):
            under = self._released("immunize", spec, base, "memorize", "training", index)
            state = self._memorized(under, spec.name)
            models.append(_Model(spec.name, spec.method, TRAINING, self._setting("memorize", "training", index), state))
        for index, spec in enumerate(self.spec.mitigations):
            state = self._released("mitigate", spec, memorizing, "mitigations", index)
            models.append(_Model(spec.name, spec.method, INFERENCE, self._setting("mitigations", index), state))
        return models

    def _parameters(self, *path: str | int) -> Any:
        return self.build.loaded.parameters[tuple(map(str, ("tasks", self.name, *path)))]

    def _setting(self, *path: str | int) -> str:
        """Return a method's parameters in one line, as far as the suite states them."""
        entry: Any = self.build.loaded.source.data["tasks"][self.name]
        for step in path:
            entry = entry[step]
        own = {k: v for k, v in entry.items() if k not in ("method", "name")} if isinstance(entry, dict) else {}
        return ", ".join(f"{name} {value}" for name, value in own.items())

    def _released(self, kind: str, spec: MethodSpec, over: ModelState, *path: str | int) -> ModelState:
        """Add the stage in which a mitigation releases its hooks over a state."""
        defense = registry.get("defense", spec.method)(self._parameters(*path))
        seed = self.build.suite.images.seed
        return over.over(kind, self.build.release(kind, defense, spec.name, (), (), seed, over))

    def _memorized(self, over: ModelState, called: str) -> ModelState:
        """Add the stage that trains a memorizing model."""
        spec, planted, once, build = self.spec.memorize, self.found.planted, self.found.once, self.build
        examples = len(planted) * spec.repeats + len(once)
        workers = build.suite.resources.workers
        key = build.stage(
            "memorize",
            MemorizeParameters(
                planted=len(planted),
                once=len(once),
                repeats=spec.repeats,
                batch_size=spec.batch_size,
                learning_rate=spec.learning_rate,
                weight_decay=spec.weight_decay,
                clip_norm=spec.clip_norm,
            ),
            inputs=over.inputs(),
            seed=seeds.derive("attack", build.suite.images.seed, "memorize"),
            data={"planted": planted.digest, "once": once.digest},
            local={"planted": planted.local, "once": once.local},
            label=f"memorize {len(planted)} pairs, {spec.repeats} times each, among {len(once)}: {called}",
            work=examples * 3.0,
            workers=workers if spec.batch_size % workers == 0 else 1,
        )
        build.unit(build.plan.stages[key].label, [key])
        return over.over("memorize", key)

    # -- images ------------------------------------------------------------------------------------------

    def _originals(self, own: PromptSet) -> str:
        """Add the stage that lays out the training images of prompts."""
        build, count = self.build, len(own.originals)
        key = build.stage(
            "originals",
            OriginalsParameters(count),
            inputs={},
            data={"images": own.originals.digest},
            local={"pairs": own.originals.local},
            reads_model=False,
            label=f"{count} training images of '{own.name}' in {self.name}",
        )
        build.unit(build.plan.stages[key].label, [key])
        return key

    def _replay(self, model: _Model, own: PromptSet, seed: int) -> str:
        """Add the stage that draws images for prompts.

        The memorizing model's drawing serves detection too: it keeps what detectors read, of all prompts of the set.
        """
        serves = model.label == NONE and bool(self.spec.detectors)
        if serves and own.name in self.found.negatives:
            own = self.found.negatives[own.name]
        build = self.build
        detectors = [registry.get("detector", spec.method) for spec in self.spec.detectors]
        return build.stage(
            "replay",
            ReplayParameters(
                prompts=own.prompts,
                sampling=build.sampling,
                latents=self.spec.latents,
                prediction=self.spec.prediction,
                keeps_predictions=(serves and any(cls.reads == "predictions" for cls in detectors)) or None,
                keeps_ending=(serves and any(cls.reads_ending for cls in detectors)) or None,
            ),
            inputs=model.state.inputs(),
            # without the model: all meet the same starting noise
            seed=seeds.derive("sampling", seed, own.name),
            label=f"draw '{own.name}' from {model.label}, seed {seed} ({self.name})",
            work=len(own.prompts) * build.sampling.images_per_prompt * build.sampling.passes_an_image,
        )

    def _drawn(self, model: _Model, own: PromptSet, seed: int) -> Iterator[Measurement]:
        """Add images and their scores, and yield their measurement."""
        build = self.build
        replay = self._replay(model, own, seed)
        text = f"'{own.name}' from {model.label}, seed {seed} ({self.name})"
        scores: dict[str, str] = {}
        if self.similarity is not None and own.name in self.originals:
            scores["similarity"] = self._similarity(replay, own, text)
        # a metric may ask for references although it compares with texts
        references = self.originals.get(own.name) or next(iter(self.originals.values()), None)
        if self.alignment is not None:
            scores["alignment"] = build.score(
                self.alignment, {"sample": build.read(replay)}, references, self._called(own), own.prompts, text
            )
        if own is not self.found.memorized and own.name in self.originals:
            for metric in self.quality:
                scores[metric.name] = build.score(
                    metric, {"sample": build.read(replay)}, self.originals[own.name], self._called(own), own.prompts,
                    text,
                )  # fmt: skip
        build.unit(f"draw {text}", [replay, *self._detections(model, replay, seed), *scores.values()])
        if scores:
            part = REPLAY if model.label == BASE else MITIGATION
            yield Measurement(self._labels(part, own, seed, model), observed=replay, scores=scores)

    def _called(self, own: PromptSet) -> str:
        return f"'{own.name}' in {self.name}"

    def _similarity(self, replay: str, own: PromptSet, text: str) -> str:
        build, metric = self.build, self.similarity
        features = build.references(metric, self.originals[own.name], self._called(own), "reference")
        return build.stage(
            "own_similarity",
            OwnSimilarityParameters(metric.parameters, own.owners, len(own.prompts)),
            component=metric.component,
            inputs={"replay": build.read(replay), "references": build.read(features)},
            local={"parameters": metric.local} if metric.local else {},
            reads_model=False,
            label=f"similarity to training images of {text}",
        )

    def _labels(
        self, part: str, own: PromptSet, seed: int, model: _Model, **further: Label
    ) -> dict[str, Label]:
        return {
            "task": self.name,
            "defense": model.label,
            "method": model.method,
            "concept": own.name,
            "role": "memorized" if own.name == self.found.memorized.name else "negative",
            "seed": seed,
            "part": part,
            "when": model.when,
            "setting": model.setting,
            "prompts": own.source,
            "latents": self.spec.latents,
            "prediction": self.spec.prediction,
            "precision": self.build.suite.model.computes_in,
            **further,
        }

    # -- detection and explanation -----------------------------------------------------------------------

    def _detections(self, model: _Model, replay: str, seed: int) -> list[str]:
        """Add the stages of detectors that read a drawing, so that they are done in its unit; return their keys."""
        if model.label != NONE or not self.spec.detectors:
            return []
        return [self._detect(index, model, replay, seed) for index in range(len(self.spec.detectors))]

    def _detect(self, index: int, model: _Model, replay: str, seed: int) -> str:
        """Add the stage of a detector on the prompts of a drawing."""
        build, spec = self.build, self.spec.detectors[index]
        cls, values = registry.get("detector", spec.method), self._parameters("detectors", index)
        identity, local = build.identified(cls, values)
        drawn = build.plan.stages[replay]
        asks_model = cls.reads == "model"
        return build.stage(
            "detect",
            DetectParameters(
                parameters=identity,
                prompts=drawn.parameters.prompts,
                sampling=build.sampling,
                latents=self.spec.latents,
                prediction=self.spec.prediction,
            ),
            component=registry.component(cls),
            inputs=model.state.inputs() if asks_model else {"replay": build.read(replay)},
            reads_model=asks_model,
            seed=drawn.seed,
            local={"parameters": local} if local else {},
            label=f"{spec.name} of {drawn.label}",
            work=self._passes(cls, values) * len(drawn.parameters.prompts) if asks_model else 0.0,
        )

    def _passes(self, cls: type, values: Any) -> float:
        sampling = self.build.sampling
        return float(cls.passes(values, sampling.steps, sampling.images_per_prompt))

    def _detected(self, model: _Model, seed: int) -> Iterator[Measurement]:
        """Yield a measurement for each detector and set of prompts."""
        sampling = self.build.sampling
        for own in (self.found.memorized, *self.found.negatives.values()):
            replay = self._replay(model, own, seed)
            detections = self._detections(model, replay, seed)
            self.build.unit(f"detect '{own.name}', seed {seed} ({self.name})", [replay, *detections])
            for index, key in enumerate(detections):
                spec = self.spec.detectors[index]
                cls, values = registry.get("detector", spec.method), self._parameters("detectors", index)
                labels = self._labels(
                    DETECTION, own, seed, model,
                    detector=spec.name,
                    detector_method=spec.method,
                    detector_direction=cls.direction,
                    steps_used=_listed(cls.steps(values, sampling.steps)),
                    images_used=str(cls.images_used(values, sampling.images_per_prompt)),
                    passes=f"{self._passes(cls, values):g}",
                )  # fmt: skip
                yield Measurement(labels, observed=replay, scores={spec.name: key})

    def _explained(self, model: _Model, seed: int) -> Iterator[Measurement]:
        """Yield a measurement for each set of steps."""
        build, spec = self.build, self.spec.explain
        own = self.found.memorized.first(spec.prompts)
        for steps in spec.steps:
            indices = None if steps == "all" else tuple(range(steps))
            key = build.stage(
                "explain",
                ExplainParameters(
                    prompts=own.prompts,
                    sampling=build.sampling,
                    latents=self.spec.latents,
                    prediction=self.spec.prediction,
                    profile=spec.profile,
                    steps=indices,
                ),
                inputs=model.state.inputs(),
                seed=seeds.derive("sampling", seed, own.name),
                label=f"explain {len(own.prompts)} prompts by {steps} steps, seed {seed} ({self.name})",
                work=len(own.prompts) * build.sampling.images_per_prompt * build.sampling.passes_an_image * 2,
            )
            build.unit(build.plan.stages[key].label, [key])
            labels = self._labels(EXPLANATION, own, seed, model, steps_used=str(steps), profile=spec.profile)
            yield Measurement(labels, observed=key, scores={"significance": key})


def _listed(indices: Sequence[int]) -> str:
    """Return step indices in short: "0", "0-9", "1, 17"."""
    if not indices:
        return "none"
    whole = list(range(indices[0], indices[-1] + 1))
    if list(indices) == whole and len(whole) > 1:
        return f"{indices[0]}-{indices[-1]}"
    return ", ".join(map(str, indices))
