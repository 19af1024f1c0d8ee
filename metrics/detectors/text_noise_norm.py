"""The norm of the text's share of the noise prediction (Wen et al., ICLR 2024): large where a prompt is memorized.

    score = mean over steps t of mean over images of |eps(x_t, t, prompt) - eps(x_t, t, "")|

the L2 norm over all elements of one image, before the guidance scale, along the guided trajectory. `steps`: 1 (the
first), 10, or all; of the first step alone no trajectory is needed: 2 passes an image.

Source: arXiv 2407.21720; facts: memorization.md 2, memorization_checked.md 1 and 5. Cost: 2 passes for each image and
step up to the last that is used. Differences from the released code: it predicts and takes norms in fp16, which makes
ties; here predictions are in the suite's precision and norms in fp64. Velocities are converted to the noise, else the
first step's norm is more than ten times as great. The mitigation of the same paper uses a norm over all images of a
prompt together, which is not this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from harness.contracts.detector import Detector
from harness.core.registry import register

Number = Annotated[int, Field(ge=1, le=1000)]


@dataclass(frozen=True)
class Parameters:
    """Defaults: those of the authors' notebook, all steps and images."""

    steps: Number | Literal["all"] = "all"
    """The first so many steps."""
    images: Number | Literal["all"] = "all"
    """The first so many images of a prompt."""


@register("detector")
class TextNoiseNorm(Detector):
    """Mean norm of the conditional minus the unconditional prediction."""

    name = "text_noise_norm"
    version = 1
    direction = "higher"
    unit = "L2 norm"
    range = (0.0, float("inf"))
    Parameters = Parameters

    @classmethod
    def check(cls, parameters, steps, images):
        """Refuse more steps or images than there are."""
        for name, given, there in (("steps", parameters.steps, steps), ("images", parameters.images, images)):
            if given != "all" and given > there:
                of = "sampling.steps" if name == "steps" else "sampling.images_per_prompt"
                yield name, f"is {given}, but {of} is {there}"

    @classmethod
    def steps(cls, parameters, available):
        """Return the first ones."""
        return tuple(range(available if parameters.steps == "all" else parameters.steps))

    @classmethod
    def images_used(cls, parameters, available):
        """Return the number of images."""
        return available if parameters.images == "all" else parameters.images

    @classmethod
    def passes(cls, parameters, steps, images):
        """Return two for each image and step."""
        return 2.0 * len(cls.steps(parameters, steps)) * cls.images_used(parameters, images)

    def score(self, seen):
        """Yield the mean norm of each prompt."""
        steps = len(self.steps(self.parameters, len(seen.timesteps)))
        images = self.images_used(self.parameters, seen.images_per_prompt)
        for prompt in range(len(seen.prompts)):
            conditional, unconditional = seen.predictions(prompt)
            difference = (conditional - unconditional)[:images, :steps]
            yield difference.double().flatten(2).norm(dim=2).mean()
