"""The contract of an attack: how someone adapts a released model to a concept, under a stated budget.

An attack obeys a `Protection` when the attacker is honest; it does not know which defense made it. At each requested
step it saves files that diffusers loads without our code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    captions: tuple[str, ...]  # one per image; they name the concept as `called`
    files: tuple[Path, ...]
    words: Words = Words("")  # complete only if the attack sets `uses_words`
    called: str = ""  # the name of the concept in this attack and in the evaluation prompts
    prior_captions: tuple[str, ...] = ()  # one per image of the class
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
    """The attacker's limits; the same for every defense."""

    steps: tuple[int, ...]  # optimizer steps at which the trajectory is read, increasing
    batch_size: int  # global: over all processes
    attacker: str = "honest"  # honest: obeys frozen tensors and training hooks; adaptive: does not

    @property
    def is_honest(self) -> bool:
        """Whether the attacker goes through the publisher's own fine-tuning interface."""
        return self.attacker == "honest"


@dataclass(frozen=True)
class UsualBudget:
    """The budget in the source of a preset: used where a suite states none; "10x" is ten times its steps."""

    steps: int
    batch_size: int


@dataclass(frozen=True)
class NewWord:
    """A word that an attack adds to the tokenizer."""

    text: str  # as it is written in captions and prompts
    tokens: int = 1  # how many it is read as


@dataclass(frozen=True)
class Checkpoint:
    """The adapted model at one step of the trajectory."""

    step: int
    save: Callable[[Path], None]  # writes into an existing, empty folder


class Attack(Method):
    """Base class of attacks. Subclasses set the class attributes and write `adapt`, `load` and `unload`."""

    budgets: ClassVar[Mapping[str, UsualBudget]] = {}
    """Preset ("" for the defaults) -> the budget in its source."""
    trains_released_weights: ClassVar[bool] = True
    """Whether it trains weights that a publisher can freeze; False: only additional weights."""
    takes_steps: ClassVar[bool] = True
    """Whether it trains; False: it is scored as it gets the released model, and `adapt` is never called."""
    uses_words: ClassVar[bool] = False
    """Whether the result depends on the parts of a name (`AttackedConcept.words`), not only on texts with the name."""

    @classmethod
    def called(cls, parameters: Any, words: Words) -> str:
        """Return the attack's name for the concept in captions and evaluation prompts."""
        return words.name

    @classmethod
    def new_words(cls, parameters: Any) -> Mapping[str, NewWord]:
        """Return the words that it adds to the tokenizer, by the parameter that sets each; {}: none.

        Before compute a suite is refused in which the tokenizer has one already, or cuts one off a text.
        """
        return {}

    @classmethod
    def training_texts(cls, parameters: Any, kind: str, captions: Sequence[str]) -> Sequence[str]:
        """Return the texts that it trains under, from the attack's captions in its own words."""
        return captions

    @classmethod
    def prior_images(cls, parameters: Any) -> int:
        """Return how many images of the concept's class it trains on; 0 for none."""
        return 0

    @classmethod
    def passes_an_example(cls, parameters: Any) -> float:
        """Return UNet passes for each example of a batch (a backward pass counts 2), for estimates."""
        return 3.0

    @classmethod
    def search_space(cls, parameters: Any) -> Space:
        """Return the parameters that an adaptive attacker may change, with their values; {}: none."""
        return {}

    @classmethod
    def compares_with_base(cls, parameters: Any) -> bool:
        """Return whether it asks what a defense moved (`DiffusionModel.moved`); rounded weights have all moved."""
        return False

    @classmethod
    def overwrites(cls, parameters: Any) -> Sequence[str]:
        """Return the weights of the model that `load` overwrites, in the words of `ThreatModel.changes`; () for none.

        For estimates of memory: `unload` needs what they were.
        """
        return ()

    @classmethod
    def can_share(cls, parameters: Any) -> bool:
        """Return whether several processes can share `adapt`, which then trains through `harness.training.sharding`.

        Only weights in the UNet can be spread. One process runs an attack that cannot be shared, or whose batch size is
        not a multiple of the number of processes.
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

        After a kill, `adapt` is called again with the same `run.folder`: it continues from the state of
        `run.save_state` and yields the steps after it (earlier ones are saved).
        """
        raise NotImplementedError

    def load(self, model: DiffusionModel, folder: Path) -> None:
        """Load the files of a checkpoint into the model's pipeline, with diffusers' own loader.

        Declare the weights that it overwrites with `model.change`.
        """
        raise NotImplementedError

    def unload(self, model: DiffusionModel) -> None:
        """Undo this object's `load`, so that the pipeline is the released model again."""
        raise NotImplementedError
