"""How much the prediction for the prompt changes from one step to the next along the guided path.

    score = mean over images of |eps(x_{k+1}, t_{k+1}, prompt) - eps(x_k, t_k, prompt)|^2

with k = 0 or 1, guidance 7.5. Facts: memorization_checked.md 6a (randomnameforicml/icml-2026 fe315bb, MIT), whose rows
are "0->1" and "1->2". Differences: predictions and norms are in the suite's precision, fp32 if not stated (there fp16);
the mean is over all images of a prompt. Under PNDM the third step repeats the timestep of the second. Cost: 2 (k + 1)
passes up to the first of the two steps, and one for the second: 3 to 5 an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.contracts.detector import Detector
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """Between which steps."""

    k: Annotated[int, Field(ge=0, le=998)] = 0
    """Index of the first of the two steps."""


@register("detector")
class Dsm(Detector):
    """Squared change of the conditional prediction between two steps."""

    name = "dsm"
    version = 1
    direction = "higher"
    unit = "squared L2 norm"
    range = (0.0, float("inf"))
    Parameters = Parameters

    @classmethod
    def check(cls, parameters, steps, images):
        """Refuse steps that are not sampled."""
        if parameters.k + 1 >= steps:
            yield "k", f"is {parameters.k}: there is no step after it, sampling.steps is {steps}"

    @classmethod
    def steps(cls, parameters, available):
        """Return the two steps."""
        return (parameters.k, parameters.k + 1)

    @classmethod
    def passes(cls, parameters, steps, images):
        """Return those up to the second step, where the empty text is not needed."""
        return (2.0 * (parameters.k + 1) + 1.0) * images

    def score(self, seen):
        """Yield the mean squared change of each prompt."""
        k = self.parameters.k
        for prompt in range(len(seen.prompts)):
            conditional, _ = seen.predictions(prompt)
            change = conditional[:, k + 1] - conditional[:, k]
            yield change.double().flatten(1).square().sum(dim=1).mean()
