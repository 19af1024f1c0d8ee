"""The contract of a defense: how the publisher changes a model before its release.

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
from harness.core.search import Space

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
    captions: tuple[str, ...] = ()  # one per image
    files: tuple[Path, ...] = ()
    prior_captions: tuple[str, ...] = ()  # one per image of the class
    prior_files: tuple[Path, ...] = ()

    def texts(self, templates: Sequence[str] | None) -> tuple[str, ...]:
        """Return the templates with the concept's words in place of {}, or without templates its captions."""
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
    """Must cover everything that `protect` releases: if it states no change, attackers who obey nothing share the
    undefended model's stages."""
    uses: ClassVar[frozenset[str]] = frozenset({"targets", "preserved", "images", "seed"})
    """What the result depends on. Anything not listed is not passed, and results are shared across its values.

    Beside those of the default, "teacher": the base model, whole and frozen, as `run.teacher`; "pairs": the task's
    general images with captions, as `run.pairs`.
    """
    may_use: ClassVar[frozenset[str]] = uses | {"teacher", "pairs"}
    """All entries that `uses` may have."""
    can_erase: ClassVar[bool] = False
    """Whether it removes the target from what the model draws, so that a task may name it under `erase`."""
    max_targets: ClassVar[int | None] = None
    """How many concepts it can protect together; None: any number."""
    interprets_predictions: ClassVar[bool] = True
    """Whether its passes through the UNet depend on what the model predicts, noise or velocity; False: it compares
    predictions with predictions only."""
    can_shard: ClassVar[bool] = False
    """Whether `protect` trains through `harness.training.sharding`, so that several processes can share it: each calls
    it with a `run` that has its rank, and all return the same protection."""

    @classmethod
    def used(cls, parameters: Any) -> frozenset[str]:
        """Return what the result depends on with these parameters: `uses` or a part of it."""
        return cls.uses

    @classmethod
    def unet_passes(cls, parameters: Any, targets: int) -> float:
        """Return roughly how many UNet passes over one sample `protect` makes (a backward pass counts 2)."""
        return 0.0

    @classmethod
    def prior_images(cls, parameters: Any) -> int:
        """Return how many images of its class each target needs, for prior preservation.

        The base model draws them (not the erased one), once for all defenses and targets that ask for the same.
        """
        return 0

    @classmethod
    def general_prompts(cls, parameters: Any) -> Sequence[str]:
        """Return a prompt for each general image that it needs, as `run.general`; (): it needs none.

        The base model draws them (not the erased one), once for all defenses that ask for the same.
        """
        return ()

    @classmethod
    def preparation(cls, parameters: Any) -> Defense | None:
        """Return a method that runs before, as a separate stage shared by all who ask for the same; None: no method.

        It is registered as "preparation" and gets the same concepts and seed; `run.prepared` has the tensors that it
        changed.
        """
        return None

    @classmethod
    def search_space(cls, parameters: Any) -> Space:
        """Return the parameters that `tune` may change, with their values; {}: none.

        They must not change what a plan needs: `used`, `prior_images`, `files`, `preparation`.
        """
        return {}

    @classmethod
    def check_task(cls, parameters: Any, targets: int, preserved: int) -> Sequence[tuple[str, str]]:
        """Return (parameter, message) for mistakes with these numbers of protected and preserved concepts."""
        return ()

    @classmethod
    def check_sharding(cls, parameters: Any, sharding: Sharding) -> Sequence[tuple[str, str]]:
        """Return (parameter, message) for settings that `sharding` does not support, such as an indivisible batch."""
        return ()

    def protect(
        self,
        model: DiffusionModel,
        targets: Sequence[ProtectedConcept],
        preserved: Sequence[ProtectedConcept],
        run: Run,
    ) -> Protection:
        """Return what is released for `model` so that adapting it to `targets` works badly.

        `preserved`: concepts that the publisher wants to keep learnable and may train on; never the innocent concepts
        that the leaderboard measures. The model may be changed in place (declare it with `model.change`): it is
        restored afterwards, and only the returned protection is kept.
        """
        raise NotImplementedError

    def keep(self, folder: Path, elements: Mapping[str, int], protection: Protection) -> None:
        """Write further files next to the protection in `folder`, for the method's own diagnostic.

        Called once, after the protection was saved there. `elements`: the model's parameters in its order, with the
        number of elements of each. By default nothing is written.
        """
