"""The contract of an attack: how someone adapts a released model to a concept, under a stated budget.

An attack honours a `Protection` when the attacker is honest; it does not know which defense made it. At
each requested step it saves files that diffusers loads without our code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.contracts.method import Method
from harness.core import pictures
from harness.core.search import Space
from harness.core.words import Words

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.contracts.protection import Protection
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run


@dataclass(frozen=True)
class AttackedConcept:
    """A concept as the attacker knows it: the attack split, under the attacker's own words."""

    kind: str  # object | style
    captions: tuple[str, ...]  # one an image; they name the concept as `called`
    files: tuple[Path, ...]
    words: Words = Words("")  # complete where the attack sets `uses_words`
    called: str = ""  # the concept's name in this attack and in the evaluation prompts
    prior_captions: tuple[str, ...] = ()  # one an image of the class
    prior_files: tuple[Path, ...] = ()

    @cached_property
    def images(self) -> list[Image]:
        """The images, RGB."""
        return pictures.read(self.files)

    @cached_property
    def prior_images(self) -> list[Image]:
        """The images of the class that `Attack.prior_images` asked for, RGB."""
        return pictures.read(self.prior_files)


@dataclass(frozen=True)
class Budget:
    """The attacker's budget; the same for every defense."""

    steps: tuple[int, ...]  # optimizer steps at which the trajectory is read, increasing
    batch_size: int  # global: over all processes
    attacker: str = "honest"  # honest: honours frozen tensors and training hooks; adaptive: does not

    @property
    def is_honest(self) -> bool:
        """Whether the attacker goes through the publisher's own fine-tuning interface."""
        return self.attacker == "honest"


@dataclass(frozen=True)
class UsualBudget:
    """The budget in the source of a preset: used where a suite gives none, and multiplied by steps such as "10x"."""

    steps: int
    batch_size: int


@dataclass(frozen=True)
class Checkpoint:
    """The adapted model at one step of the trajectory."""

    step: int
    save: Callable[[Path], None]  # writes into an existing, empty folder


class Attack(Method):
    """Base class of attacks. Subclasses set the class attributes and write `adapt`, `load` and `unload`."""

    budgets: ClassVar[Mapping[str, UsualBudget]] = {}
    """Preset, "" for the defaults -> the budget in its source."""
    trains_released_weights: ClassVar[bool] = True
    """Whether it trains weights that a publisher can freeze; False: only additional weights."""
    uses_words: ClassVar[bool] = False
    """Whether the result depends on the parts of a name (`AttackedConcept.words`), beside the texts that contain it."""

    @classmethod
    def called(cls, parameters: Any, words: Words) -> str:
        """Return the name of the concept in captions and evaluation prompts under this attack."""
        return words.name

    @classmethod
    def prior_images(cls, parameters: Any) -> int:
        """Return how many images of the concept's class it trains on; 0 for none."""
        return 0

    @classmethod
    def passes_an_example(cls, parameters: Any) -> float:
        """Return UNet passes for each example of a batch (a backward counts 2): for estimates."""
        return 3.0

    @classmethod
    def search_space(cls, parameters: Any) -> Space:
        """Return the parameters that an adaptive attacker may change, with their values; {}: none."""
        return {}

    @classmethod
    def can_share(cls, parameters: Any) -> bool:
        """Return whether several processes can share `adapt`: it trains through `harness.training.sharding`.

        Only what is in the UNet can be spread. An attack that cannot, or whose batch the processes do not divide, is
        made by one process.
        """
        return False

    def adapt(
        self,
        model: DiffusionModel,
        concept: AttackedConcept,
        protection: Protection,
        budget: Budget,
        run: Run,
    ) -> Iterator[Checkpoint]:
        """Train and yield a checkpoint at each of `budget.steps`; a checkpoint is saved before the next is asked for.

        After a kill, `adapt` is called again with the same `run.folder`: it goes on from what `run.save_state` kept
        and yields the steps after it (those before are saved).
        """
        raise NotImplementedError

    def load(self, model: DiffusionModel, folder: Path) -> None:
        """Load what a checkpoint saved into the model's pipeline, by diffusers' own loader.

        Weights that it overwrites are declared by `model.change`.
        """
        raise NotImplementedError

    def unload(self, model: DiffusionModel) -> None:
        """Undo `load` of this object, so that the pipeline is the released model again."""
        raise NotImplementedError
