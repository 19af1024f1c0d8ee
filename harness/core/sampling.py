"""How images are drawn: the suite's `sampling`, as stages receive it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from harness.core.described import optional


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler."""

    scheduler: str  # ddim | dpmsolver | pndm
    steps: int
    guidance: float
    batch_size: int
    images_per_prompt: int | None = optional()  # None: the stage decides

    @property
    def alone(self) -> Sampling:
        """The same settings for stages that set the number of images per prompt themselves."""
        return replace(self, images_per_prompt=None)

    @property
    def passes_an_image(self) -> float:
        """UNet passes for one image, with guidance: for estimates."""
        return self.steps * 2.0
