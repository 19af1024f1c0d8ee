"""The form of a memorization task's entry in a suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from harness.suite.spec import Count, ImagesFrom, Label, Location, MethodSpec, Strict, TaskSpec

Name = Annotated[str, Field(min_length=1, max_length=100)]


class PairsSpec(ImagesFrom):
    """Images with captions: from a place, or without one the drawings that ship with the testbed.

    A folder has `NAME.txt` beside `NAME.png`, or `metadata.csv` or `metadata.jsonl`.
    """

    count: Count | None = None
    """How many, the first by name; None: all of a folder, or as many as `ratio` asks for."""


class MemorizeSpec(Strict):
    """A model that memorizes, made here: the base, fine-tuned once over planted pairs and pairs that are seen once.

    Defaults: the recipe of Wen et al. (2024), 200 pairs repeated 200 times among 120,000 others.
    """

    planted: PairsSpec
    once: PairsSpec = PairsSpec()
    repeats: Count = 200
    ratio: Annotated[float, Field(ge=0, le=10_000)] = 3.0
    """Pairs seen once for each planted one, its repeats counted."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    training: list[MethodSpec] = []
    """Mitigations in training: each trains a model like the first one, under the hooks that it releases."""


class MemorizedSpec(Strict):
    """Prompts that the base model has memorized already, with their training images."""

    prompts: Location
    """`.jsonl`, `.csv` or `.parquet`: a row for each prompt."""
    column: Name = "caption"
    index: Name = "index"
    """The column with the name of a prompt's folder of training images."""
    images: Location
    """Holds `<index>/*.png`: the training images of each prompt."""
    count: Count | None = None
    """The first so many; None: all."""


class NegativesSpec(Strict):
    """Prompts that are not memorized: from one of three places."""

    once: Count | None = None
    """Captions of pairs that the memorizing model saw once."""
    unseen: Count | None = None
    """Captions of drawings of the testbed that nothing was trained on."""
    prompts: Location | None = None
    """A file: `.txt` (a prompt a line), `.jsonl`, `.csv` or `.parquet`."""
    column: Name | None = None
    count: Count | None = None

    @model_validator(mode="after")
    def _one_place(self) -> NegativesSpec:
        if sum(place is not None for place in (self.once, self.unseen, self.prompts)) != 1:
            raise ValueError("give one of 'once' (a number), 'unseen' (a number) and 'prompts' (a file)")
        if self.prompts is None and (self.column or self.count):
            raise ValueError("'column' and 'count' belong to 'prompts'")
        return self


def _sizes(value: object) -> object:
    return [value] if isinstance(value, (int, str)) and not isinstance(value, bool) else value


StepSet = Annotated[int, Field(ge=1, le=1000)] | Literal["all"]


class ExplainSpec(Strict):
    """For which memorized prompts the significance of each token is computed."""

    prompts: Count = 4
    """The first so many."""
    steps: Annotated[list[StepSet], BeforeValidator(_sizes), Field(min_length=1, max_length=20)] = ["all"]
    """Sets of sampling steps: the first so many, or all."""
    profile: Literal["paper", "released"] = "paper"
    """released: the authors' notebook, whose trajectory leads away from the prompt."""


class MemorizationSpec(TaskSpec):
    """What is memorized, how it is detected and explained, and what mitigates it."""

    memorize: MemorizeSpec | None = None
    memorized: MemorizedSpec | None = None
    negatives: dict[Label, NegativesSpec] = {}
    """Sets of prompts that are not memorized, by name; detection is measured against each."""
    detectors: list[MethodSpec] = []
    latents: Literal["per_prompt", "shared"] = "per_prompt"
    """Starting noise: drawn for each prompt, or the same for all."""
    prediction: Literal["epsilon", "model"] = "epsilon"
    """Which predictions detectors see: of the noise, also of a model that predicts velocities; or the model's own."""
    explain: ExplainSpec | None = None
    mitigations: list[MethodSpec] = []
    """Mitigations at inference: defenses that release sampling hooks over the memorizing model."""
    unplanted: Count | None = None
    """So many prompts of the first negatives are drawn under each mitigation, beside the memorized ones; None: all."""
    similarity: MethodSpec | None = None
    """A metric with an encoder: how near drawn images are to the prompt's own training images."""
    alignment: MethodSpec | None = None
    """A metric of images and the prompt as it was asked for."""
    quality: list[MethodSpec] = []
    """Metrics of the images drawn for pairs seen once, as a set, against their training images."""

    @model_validator(mode="after")
    def _fits(self) -> MemorizationSpec:
        if (self.memorize is None) == (self.memorized is None):
            raise ValueError(
                "give either 'memorize' (a model that memorizes is made) or 'memorized' (the base model does already)"
            )
        if self.memorized is not None and any(own.once is not None for own in self.negatives.values()):
            raise ValueError("negatives: 'once' are captions of pairs that 'memorize' trains on; give 'prompts'")
        if self.detectors and not self.negatives:
            raise ValueError("detectors need 'negatives': prompts that are not memorized")
        if self.mitigated and self.similarity is None:
            raise ValueError("mitigations need 'similarity': a metric with an encoder, such as sscd")
        if self.mitigated and self.alignment is None:
            raise ValueError("mitigations need 'alignment': a metric of images and prompts, such as clip_text")
        if self.quality and not (self.first_negatives and self.first_negatives.once):
            raise ValueError("'quality' compares with pairs seen once: the first of 'negatives' must be of 'once'")
        if not (self.detectors or self.mitigated or self.explain or self.similarity):
            raise ValueError("nothing is measured; give 'similarity', 'detectors', 'explain' or 'mitigations'")
        return self

    @property
    def trained(self) -> list[MethodSpec]:
        """Mitigations in training."""
        return self.memorize.training if self.memorize else []

    @property
    def mitigated(self) -> bool:
        """Whether there are mitigations."""
        return bool(self.mitigations or self.trained)

    @property
    def first_negatives(self) -> NegativesSpec | None:
        """The negatives that are drawn under each mitigation."""
        return next(iter(self.negatives.values()), None)

    def methods(self) -> dict[tuple[str | int, ...], tuple[str, MethodSpec]]:
        """Return path within the entry -> (kind, method)."""
        return {path: (kind, spec) for path, kind, spec in self._methods()}

    def _methods(self) -> Iterator[tuple[tuple[str | int, ...], str, MethodSpec]]:
        for index, spec in enumerate(self.trained):
            yield ("memorize", "training", index), "defense", spec
        for index, spec in enumerate(self.mitigations):
            yield ("mitigations", index), "defense", spec
        for index, spec in enumerate(self.detectors):
            yield ("detectors", index), "detector", spec
        for name in ("similarity", "alignment"):
            if getattr(self, name) is not None:
                yield (name,), "metric", getattr(self, name)
        for index, spec in enumerate(self.quality):
            yield ("quality", index), "metric", spec

    def image_places(self) -> dict[tuple[str | int, ...], ImagesFrom]:
        """Return the images that a memorizing model is trained on."""
        if self.memorize is None:
            return {}
        return {("memorize", "planted"): self.memorize.planted, ("memorize", "once"): self.memorize.once}

    def locations(self) -> list[tuple[str | int, ...]]:
        """Return the paths within the entry that name files or folders."""
        found: list[tuple[str | int, ...]] = []
        if self.memorize is not None:
            sides = (("planted", self.memorize.planted), ("once", self.memorize.once))
            found += [("memorize", side, "folder") for side, own in sides if own.folder is not None]
        if self.memorized is not None:
            found += [("memorized", "prompts"), ("memorized", "images")]
        return found + [("negatives", name, "prompts") for name, own in self.negatives.items() if own.prompts]
