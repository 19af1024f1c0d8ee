"""The contract of a defense: what the publisher does to a model before its release.

A defense is one file: a class with its `Parameters` above it, registered by a decorator. Modules of defenses are
imported to check suites, so they import torch inside `protect` (or the functions it calls), not at the top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from harness.contracts.method import Method
from harness.contracts.protection import Protection, ThreatModel
from harness.core import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from harness.core.sharding import Sharding
    from harness.model.pipeline import DiffusionModel
    from harness.model.run import Run


@dataclass(frozen=True)
class ProtectedConcept:
    """A concept as the publisher knows it: its words and its defense split. Never the attack or reference split."""

    kind: str  # object | style
    phrase: str
    captions: tuple[str, ...] = ()  # one an image
    files: tuple[Path, ...] = ()
    prior_captions: tuple[str, ...] = ()  # one an image of the class
    prior_files: tuple[Path, ...] = ()

    def texts(self, templates: Sequence[str] | None) -> tuple[str, ...]:
        """Return templates with the concept's words for {}, or its captions where there are no templates."""
        if templates is None:
            return self.captions
        return tuple(template.replace("{}", self.phrase) for template in templates)

    @cached_property
    def images(self) -> list[Image]:
        """The images of the defense split, RGB."""
        return pictures.read(self.files)

    @cached_property
    def prior_images(self) -> list[Image]:
        """The images of the class that `Defense.prior_images` asked for, RGB."""
        return pictures.read(self.prior_files)


class Defense(Method):
    """Base class of defenses. Subclasses set the class attributes and write `protect`."""

    threat_model: ClassVar[ThreatModel] = ThreatModel(changes=("unet",))
    """Must cover everything that `protect` releases: where nothing changes, attackers who honour nothing share the
    undefended model's stages."""
    uses: ClassVar[frozenset[str]] = frozenset({"targets", "preserved", "images", "seed"})
    """What the result depends on. Anything else is not passed to `protect`, and results are shared over it."""
    can_erase: ClassVar[bool] = False
    """Whether it removes the target from what the model draws, so that a task may name it under `erase`."""
    max_targets: ClassVar[int | None] = None
    """How many concepts it can protect together; None: any number."""
    can_shard: ClassVar[bool] = False
    """Whether `protect` trains through `harness.training.sharding`, so that several processes can share it: each calls
    it with a `run` that has the process's rank, and all return the same protection."""

    @classmethod
    def used(cls, parameters: Any) -> frozenset[str]:
        """Return what the result depends on with these parameters: `uses`, or less."""
        return cls.uses

    @classmethod
    def unet_passes(cls, parameters: Any, targets: int) -> float:
        """Return roughly how many UNet passes over one sample `protect` makes (a backward counts 2): for estimates."""
        return 0.0

    @classmethod
    def prior_images(cls, parameters: Any) -> int:
        """Return how many images of its class each target shall come with, for prior preservation.

        The base model draws them (not the erased one), once for all defenses and targets that ask for the same.
        """
        return 0

    @classmethod
    def preparation(cls, parameters: Any) -> Defense | None:
        """Return a method that runs before, as a separate stage, once for all that ask for the same; None: nothing.

        It is registered as "preparation" and gets the same concepts and seed; the tensors that it changed are
        `run.prepared`.
        """
        return None

    @classmethod
    def check_task(cls, parameters: Any, targets: int, preserved: int) -> Sequence[tuple[str, str]]:
        """Return (parameter, message) for each mistake with so many concepts, protected and preserved."""
        return ()

    @classmethod
    def check_sharding(cls, parameters: Any, sharding: Sharding) -> Sequence[tuple[str, str]]:
        """Return (parameter, message) for each mistake with the processes, such as a batch that they do not divide."""
        return ()

    def protect(
        self,
        model: DiffusionModel,
        targets: Sequence[ProtectedConcept],
        preserved: Sequence[ProtectedConcept],
        run: Run,
    ) -> Protection:
        """Return what is released for `model` so that adapting it to `targets` works badly.

        `preserved` are concepts that the publisher wants kept learnable and may train on; the innocent concepts that
        the leaderboard measures are never among them. The model may be changed in place (declare it with
        `model.change`): it is put back afterwards, and only the returned protection is kept.
        """
        raise NotImplementedError

    def keep(self, folder: Path, elements: Mapping[str, int], protection: Protection) -> None:
        """Write further files into `folder`, beside the protection, for the method's own diagnostic.

        Called once, after the protection was saved there. `elements` are the model's parameters in its order, with the
        number of elements of each. By default nothing is written.
        """
