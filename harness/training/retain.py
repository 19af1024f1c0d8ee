"""`retain`: a bound on what must stay, for defenses that ascend a loss. Ours: no paper has it. Without torch.

    max_theta U(theta)   subject to   R(theta) <= bound * R(theta_0)

U is the method's upper loss, theta_0 the weights before immunization, and R the denoising loss on images that must stay
learnable and drawable. `harness.training.retention` does the training; docs/constrained.md describes both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from harness.contracts.defense import Defense

Kind = Literal["class", "preserved", "general"]
REFERENCES = 64
"""Most batches of each kind whose start loss is computed; later steps use the same batches again."""


@dataclass(frozen=True)
class Retain:
    """The bound, and how it is kept."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    bound: Annotated[float, Field(ge=1, le=1000)] = 1.05
    """The loss may rise to at most so many times its start."""
    images: tuple[Kind, ...] = ("class",)
    """class: class images of the targets, drawn by the base model; preserved: images of the concepts that the task
    lists under `preserve`; general: images that the base model draws for `captions`. R is the mean over these kinds."""
    by: Literal["dual", "projection"] = "dual"
    """dual: a learned multiplier of R. projection: where R is above the bound, the ascent is projected off its
    gradient, with a descent in proportion to the excess."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 4
    """Images of each kind per upper step; global: over all processes."""
    captions: Annotated[str, Field(min_length=1, max_length=4000)] | None = None
    """For general images: the name of a caption list that ships with the suites, or the path of a file with one caption
    per line."""
    count: Annotated[int, Field(ge=1, le=10_000)] = 64
    """Class images of each target, and general images. Captions are repeated if there are fewer."""
    rate: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """dual: what an excess of 1 adds to the multiplier at each step. Not used by projection."""
    penalty: Annotated[float, Field(ge=0, le=1e6)] = 20.0
    """dual: what an excess of 1 adds to the multiplier for that step alone, which damps its swings. projection: the
    length of the descent at an excess of 1, divided by the length of the ascent."""
    window: Annotated[float, Field(ge=1, le=10_000)] = 5.0
    """Steps over which the ratio is smoothed: each counts 1 - 1/window times as much as the next one."""

    def __post_init__(self) -> None:
        """Reject invalid combinations."""
        if not self.images:
            raise ValueError("images: empty; name class, preserved or general, one or several")
        if len(set(self.images)) < len(self.images):
            raise ValueError("images: each kind may be named once")
        if "general" in self.images and self.captions is None:
            raise ValueError("captions: missing for images: general; name a caption list, such as captions")
        if self.captions is not None and "general" not in self.images:
            raise ValueError("captions: used for images: general only; add general to images, or leave captions out")

    def passes(self, rounds: int) -> float:
        """Return the UNet passes: of the start losses, and of a gradient in each round."""
        return len(self.images) * self.batch_size * (min(rounds, REFERENCES) + 3.0 * rounds)


class Retaining(Defense):
    """Base class of defenses with a parameter `retain`. Overriding functions add what these return.

    Their parameters also have `rounds`, the number of upper steps.
    """

    @classmethod
    def used(cls, parameters: Any) -> frozenset[str]:
        """Leave out the preserved concepts unless they are retained."""
        needed = parameters.retain is not None and "preserved" in parameters.retain.images
        return cls.uses if needed else cls.uses - {"preserved"}

    @classmethod
    def files(cls, parameters: Any) -> dict[str, Path]:
        """The caption list of general images."""
        from harness.core.captions import path

        retain = parameters.retain
        return {} if retain is None or retain.captions is None else {"retain.captions": path(retain.captions)}

    @classmethod
    def general_prompts(cls, parameters: Any) -> tuple[str, ...]:
        """Captions of general images, in the order of their list."""
        from harness.core.captions import read

        retain = parameters.retain
        if retain is None or retain.captions is None:
            return ()
        found = read(retain.captions, retain.count)
        return tuple(found[index % len(found)] for index in range(retain.count))

    @classmethod
    def prior_images(cls, parameters: Any) -> int:
        """The class images of each target whose loss is bounded."""
        retain = parameters.retain
        return retain.count if retain is not None and "class" in retain.images else 0

    @classmethod
    def unet_passes(cls, parameters: Any, targets: int) -> float:
        """The passes that the bound adds."""
        return 0.0 if parameters.retain is None else parameters.retain.passes(parameters.rounds)

    @classmethod
    def check_task(cls, parameters: Any, targets: int, preserved: int) -> Sequence[tuple[str, str]]:
        """Reject a bound on preserved images where the task preserves nothing."""
        retain = parameters.retain
        if retain is not None and "preserved" in retain.images and not preserved:
            missing = "images: the task preserves no concept; list some under 'preserve', or use class or general"
            return [("retain", missing)]
        return []

    @classmethod
    def check_sharding(cls, parameters: Any, sharding: Any) -> Sequence[tuple[str, str]]:
        """Reject a batch that the processes do not divide."""
        retain = parameters.retain
        if retain is None or retain.batch_size % sharding.workers == 0:
            return []
        what = f"{sharding.workers} workers do not divide the global batch of {retain.batch_size}"
        return [("retain", f"batch_size: {what}; change it or resources.workers")]


def with_few_rounds(parameters: Any) -> Any:
    """Return parameters for a rehearsal: with a bound, few rounds, so that few start losses are computed first."""
    return parameters if parameters.retain is None else replace(parameters, rounds=min(parameters.rounds, 4))
