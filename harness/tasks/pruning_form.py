"""The form of a pruning task's entry in a suite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from harness.model.unet_plan import DROPS
from harness.suite.spec import ConceptName, Count, ImagesFrom, Label, Location, MethodSpec, Strict, TaskSpec
from harness.tasks.immunization_form import ProtectedSet

UNPRUNED, PRUNED = "unpruned", "pruned"
"""Labels of rows that are always there: the base model, and the student before any training."""
CONTROL = "distill"
"""The method of the control: students that are distilled only."""


class StudentSpec(Strict):
    """A pruned UNet: made here by magnitude, or read from a folder."""

    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the base UNet's multiply-accumulates that stays."""
    drop: list[Literal[DROPS]] = []
    """What is dropped whole in any case, before widths shrink: `harness.model.unet_plan.DROPS`."""
    folder: Location | None = None
    """A UNet as diffusers saves it, such as a published BK-SDM: `config.json` and safetensors, or a folder `unet` with
    them."""

    @model_validator(mode="after")
    def _one_source(self) -> StudentSpec:
        if (self.keep is None) == (self.folder is None):
            raise ValueError("give either 'keep' (a share of the base UNet's work) or 'folder' (a student that exists)")
        if self.drop and self.keep is None:
            raise ValueError("'drop' belongs to 'keep': a student in a folder is taken as it is")
        return self


class GeneralSpec(ImagesFrom):
    """General images with captions: students are distilled on them, and the last ones measure quality.

    A folder has `NAME.txt` beside `NAME.png`, or `metadata.csv` or `metadata.jsonl`. Without a place on the testbed:
    its drawings of what the generator knows, without those that show a target.
    """

    count: Count | None = None
    """How many, the first by name; None: all."""
    held_out: Annotated[int, Field(ge=2, le=100_000)] = 100
    """So many are never trained on: their captions are drawn, one image each, and compared with their images."""


def _named(value: Any) -> Any:
    """Accept one method in place of a recipe of one step."""
    if isinstance(value, str):
        return {"name": value, "chain": [value]}
    if isinstance(value, dict) and "chain" not in value and "method" in value:
        return {"name": value.get("name", value["method"]), "chain": [value]}
    return value


class RecipeSpec(Strict):
    """How a student is fine-tuned: methods one after the other, the first of which trains the pruned student."""

    name: Label
    chain: Annotated[list[MethodSpec], Field(min_length=1, max_length=2)]

    @property
    def is_control(self) -> bool:
        """Whether it distills only."""
        return [step.method for step in self.chain] == [CONTROL]


Recipe = Annotated[RecipeSpec, BeforeValidator(_named)]


class PruningSpec(TaskSpec):
    """A student, how it is fine-tuned while concepts are suppressed, and what is measured of it."""

    student: StudentSpec
    general: GeneralSpec = GeneralSpec()
    targets: Annotated[list[ProtectedSet], Field(min_length=1, max_length=10_000)]
    """Sets of concepts that are suppressed together."""
    innocents: list[ConceptName] = []
    recipes: Annotated[list[Recipe], Field(min_length=1, max_length=1000)]
    """One of them is `distill` alone: the control that every other one is compared with."""
    alignment: MethodSpec | None = None
    """A metric of images and prompts, for general captions, such as clip_text."""
    quality: list[MethodSpec] = []
    """Metrics of sets of images, against the held-out general images: fid, kid, cmmd."""
    works: MethodSpec | None = None
    """A metric with an encoder, for drawn targets against real works of them (the testbed's catalog; for folders the
    suite's metrics compare with real works already)."""

    @model_validator(mode="after")
    def _has_a_control(self) -> PruningSpec:
        names = [recipe.name for recipe in self.recipes]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two recipes have the name '{twice}'; give one another 'name'")
        if sum(recipe.is_control for recipe in self.recipes if isinstance(recipe, RecipeSpec)) != 1:
            raise ValueError(
                f"exactly one recipe must be '{CONTROL}' alone: every other one is compared with what it releases"
            )
        return self

    preserve: ClassVar[tuple[str, ...]] = ()
    """Checks of the attack grid ask for it; recipes preserve by general images."""

    @property
    def control(self) -> RecipeSpec:
        """The recipe that distills only."""
        return next(recipe for recipe in self.recipes if recipe.is_control)

    def flat_targets(self) -> list[str]:
        """Return the targets of all sets, each once, in order."""
        return list(dict.fromkeys(concept for together in self.targets for concept in together))

    def concept_names(self) -> list[str]:
        """Return targets and innocents."""
        return list(dict.fromkeys([*self.flat_targets(), *self.innocents]))

    def most_together(self) -> int:
        """Return the size of the largest set."""
        return max(map(len, self.targets), default=1)

    def methods(self) -> dict[tuple[str | int, ...], tuple[str, MethodSpec]]:
        """Return path within the entry -> (kind, method)."""
        return {path: (kind, spec) for path, kind, spec in self._methods()}

    def _methods(self) -> Iterator[tuple[tuple[str | int, ...], str, MethodSpec]]:
        for index, recipe in enumerate(self.recipes):
            for step, spec in enumerate(recipe.chain):
                yield ("recipes", index, "chain", step), "defense", spec
        for name in ("alignment", "works"):
            if getattr(self, name) is not None:
                yield (name,), "metric", getattr(self, name)
        for index, spec in enumerate(self.quality):
            yield ("quality", index), "metric", spec

    def image_places(self) -> dict[tuple[str | int, ...], ImagesFrom]:
        """Return the general images."""
        return {("general",): self.general}

    def locations(self) -> list[tuple[str | int, ...]]:
        """Return the paths within the entry that name files or folders."""
        found = [("student", "folder")] if self.student.folder is not None else []
        return found + ([("general", "folder")] if self.general.folder is not None else [])
