"""The norm of the text's share of the prediction, and its cosine to the prediction without text (Asthana et al., 2026).

    delta(x, t) = eps(x, t, prompt) - eps(x, t, "")
    score = g1 |delta(x_T, t_first)| + g2 mean over space of cos(eps(x_T, t_late, ""), delta(x_T, t_late))

the cosine over channels at each place, on the same noise x_T at the timestep `late` from the end (-3: about t = 41 of
1000 in 50 steps); mean over images. No sampling: 4 passes an image.

Source: ICLR 2026; facts: memorization_checked.md 6a (rohanasthana 97e991b, MIT). Settings there: g1, g2 = 1, 2 for
SD 1.4; 1, .1 for SD 2, on the difference of scores; 2, 1 for Realistic Vision. Difference: for SD 2 too, delta is of
noise predictions, converted from velocities; it has another size than the difference of scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.contracts.detector import Detector
from harness.core.registry import register

Weight = Annotated[float, Field(ge=0, le=1e6)]


@dataclass(frozen=True)
class Parameters:
    """Defaults: those for SD 1.4."""

    norm_weight: Weight = 1.0
    """g1."""
    cosine_weight: Weight = 2.0
    """g2."""
    late: Annotated[int, Field(ge=-1000, le=-1)] = -3
    """Index of the late timestep, from the end."""


@register("detector")
class Anisotropy(Detector):
    """Norm at the first step plus alignment at a late one, on pure noise."""

    name = "anisotropy"
    version = 1
    direction = "higher"
    unit = ""
    range = (float("-inf"), float("inf"))
    reads = "model"
    Parameters = Parameters
    presets = {
        "sd1": {"norm_weight": 1.0, "cosine_weight": 2.0},
        "sd2": {"norm_weight": 1.0, "cosine_weight": 0.1},
        "realistic_vision": {"norm_weight": 2.0, "cosine_weight": 1.0},
    }

    @classmethod
    def check(cls, parameters, steps, images):
        """Refuse a timestep before the first."""
        if -parameters.late > steps:
            yield "late", f"is {parameters.late}, but sampling.steps is {steps}"

    @classmethod
    def steps(cls, parameters, available):
        """Return the first step and the late one."""
        return (0, available + parameters.late)

    @classmethod
    def passes(cls, parameters, steps, images):
        """Return four an image."""
        return 4.0 * images

    def score(self, seen):
        """Yield the weighted sum of each prompt."""
        import torch

        p = self.parameters
        for prompt in range(len(seen.prompts)):
            start = seen.start(prompt)
            conditional, unconditional = seen.predict(prompt, start, seen.timesteps[0])
            norm = (conditional - unconditional).flatten(1).norm(dim=1).mean()
            conditional, unconditional = seen.predict(prompt, start, seen.timesteps[p.late])
            cosine = torch.nn.functional.cosine_similarity(unconditional, conditional - unconditional, dim=1).mean()
            yield p.norm_weight * norm + p.cosine_weight * cosine
