"""The contract of a detector: how strongly a model's predictions for a prompt look like those of a memorized one.

A detector gives one score a prompt. It reads what was kept of the sampling of some prompts (`Seen`): noise predictions
along the trajectory, or the drawn images; or it makes predictions itself (`reads = "model"`). All detectors that read a
trajectory share one. A small example::

    @register("detector")
    class LastStep(Detector):
        name = "last_step"
        version = 1
        direction, unit, range = "higher", "L2 norm", (0.0, float("inf"))

        @classmethod
        def steps(cls, parameters, available):
            return (available - 1,)

        @classmethod
        def passes(cls, parameters, steps, images):
            return 2.0 * steps * images

        def score(self, seen):
            for prompt in range(len(seen.prompts)):
                conditional, unconditional = seen.predictions(prompt)
                yield (conditional - unconditional)[:, -1].flatten(1).norm(dim=1).mean()

Modules of detectors are imported with the methods, so they import torch inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from harness.contracts.method import Method

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class Seen(Protocol):
    """What a detector may see of some prompts.

    Predictions are of the noise (epsilon), in fp32, also of a model that predicts velocities, unless the suite asks for
    the model's own. Images of a prompt differ in their starting noise.
    """

    prompts: Sequence[str]
    images_per_prompt: int
    timesteps: Sequence[int]
    """Of all denoising steps, from noise to image."""

    def predictions(self, prompt: int) -> tuple[Tensor, Tensor]:
        """Return (for the prompt, for the empty text) along the guided trajectory.

        Both are [images, steps, channels, height, width]. Raises ValueError where `reads` is not "predictions".
        """

    def ending(self, prompt: int) -> Tensor:
        """Return the attention to the prompt's end token at the last step: [images, height, width] of the latents.

        The mean over heads and over the first two cross-attention layers on the way down. Raises ValueError where
        `reads_ending` is False.
        """

    def images(self, prompt: int) -> list[Image]:
        """Return the drawn images of a prompt."""

    def start(self, prompt: int) -> Tensor:
        """Return the starting noise [images, channels, height, width] of a prompt; `reads = "model"` only."""

    def predict(self, prompt: int, latents: Tensor, timestep: int) -> tuple[Tensor, Tensor]:
        """Return (for the prompt, for the empty text), each shaped like latents; `reads = "model"` only.

        Two passes a row of the latents, counted in the ledger.
        """


class Detector(Method):
    """Base class of detectors. Subclasses set the class attributes and write `passes` and `score`."""

    direction: ClassVar[Literal["higher", "lower"]] = "higher"
    """"higher": a greater score means memorized."""
    unit: ClassVar[str] = ""
    range: ClassVar[tuple[float, float]] = (float("-inf"), float("inf"))
    reads: ClassVar[Literal["predictions", "images", "model"]] = "predictions"
    """What it sees: predictions along the trajectory, drawn images, or those that it asks the model for."""
    reads_ending: ClassVar[bool] = False
    """Whether it also reads `Seen.ending`; for `reads = "predictions"`."""

    @classmethod
    def steps(cls, parameters: Any, available: int) -> tuple[int, ...]:
        """Return the indices of the denoising steps that it uses, from 0; () if it uses none."""
        return tuple(range(available))

    @classmethod
    def images_used(cls, parameters: Any, available: int) -> int:
        """Return how many images of a prompt it uses."""
        return available

    @classmethod
    def check(cls, parameters: Any, steps: int, images: int) -> Iterable[tuple[str, str]]:
        """Return (parameter or "", why) if it cannot be used with so many steps and images a prompt."""
        return ()

    @classmethod
    def passes(cls, parameters: Any, steps: int, images: int) -> float:
        """Return the UNet passes that the score of a prompt costs when it is computed alone; a backward pass counts 2.

        `steps`, `images`: those of a whole sampling. Passes for drawing up to the last step that it uses count.
        """
        raise NotImplementedError

    def score(self, seen: Seen) -> Iterable[float]:
        """Return one score for each of `seen.prompts`, in order: numbers or tensors of one element."""
        raise NotImplementedError
