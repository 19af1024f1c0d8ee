"""The contract of an attack: how someone adapts a released model to a concept, under a stated budget.

An attack honours a `Protection` when the attacker is honest; it does not know which defense made it. It leaves, at
each step asked for, what diffusers loads without our code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from harness.method import Method

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.models import DiffusionModel
    from harness.protection import Protection
    from harness.run import Run


@dataclass(frozen=True)
class AttackedConcept:
    """A concept as the attacker knows it: the attack split, under the attacker's own words."""

    kind: str  # object | style
    captions: tuple[str, ...]  # one an image
    files: tuple[Path, ...]

    @cached_property
    def images(self) -> list[Image]:
        """The images, RGB."""
        from PIL import Image

        return [Image.open(file).convert("RGB") for file in self.files]


@dataclass(frozen=True)
class Budget:
    """What the attacker may spend; the same for every defense."""

    steps: tuple[int, ...]  # optimizer steps at which the trajectory is read, increasing
    batch_size: int  # global: over all processes
    attacker: str = "honest"  # honest: honours frozen tensors and training hooks


@dataclass(frozen=True)
class Checkpoint:
    """The adapted model at one step of the trajectory."""

    step: int
    save: Callable[[Path], None]  # writes into an existing, empty folder


class Attack(Method):
    """Base class of attacks. Subclasses set the class attributes and write `adapt`, `load` and `unload`."""

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
        and yields the steps after it (those before lie saved).
        """
        raise NotImplementedError

    def load(self, model: DiffusionModel, folder: Path) -> None:
        """Load what a checkpoint saved into the model's pipeline, by diffusers' own loader.

        Weights that it overwrites are declared by `model.change`.
        """
        raise NotImplementedError

    def unload(self, model: DiffusionModel) -> None:
        """Undo what `load` of this object did, so that the pipeline is the released model again."""
        raise NotImplementedError
