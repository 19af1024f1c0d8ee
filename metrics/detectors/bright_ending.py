"""The norm of the text's share where the prompt's end token attends (bright ending; Chen et al., ICLR 2025).

    score = mean over steps t of |(eps(x_t, t, prompt) - eps(x_t, t, "")) m| / mean(m), mean over images

with m [height, width] the cross-attention of each place to the prompt's end token at the last step, mean over heads and
over the first two layers on the way down; for SD those at the size of the latents. Where a memorized image is replayed,
the end token attends at the last step.

Source: chenchen-usyd/BE-PRSS fb2e942 (MIT); facts: memorization_checked.md 6a. There 16 images a prompt. Differences:
where a UNet has one such layer, it alone is used; if its layers have fewer places than the latents, m is repeated to
their size (the testbed: one layer of 8 x 8 places). Cost: a whole drawing, 2 passes for each image and step; attention
is kept along the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.contracts.detector import Detector
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """None."""


@register("detector")
class BrightEnding(Detector):
    """Mean norm of the text's share, weighed by the attention to the end token."""

    name = "bright_ending"
    version = 1
    direction = "higher"
    unit = "L2 norm"
    range = (0.0, float("inf"))
    reads_ending = True
    Parameters = Parameters

    @classmethod
    def passes(cls, parameters, steps, images):
        """Return those of whole drawings."""
        return 2.0 * steps * images

    def score(self, seen):
        """Yield the mean weighed norm of each prompt."""
        for prompt in range(len(seen.prompts)):
            conditional, unconditional = seen.predictions(prompt)
            mask = seen.ending(prompt).double()[:, None, None]  # for all steps and channels
            norms = ((conditional - unconditional).double() * mask).flatten(2).norm(dim=2)  # [images, steps]
            yield (norms / mask.flatten(1).mean(dim=1, keepdim=True)).mean()
