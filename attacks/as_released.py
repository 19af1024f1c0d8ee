"""The released model as it is, or with rounded weights: an attack that takes no step.

With `rounded_to` in its entry (int8, int4, fp16, bf16; `harness.model.rounding`) it asks whether a protection sits in
the last bits of the weights: quantising and casting is what everyone does who runs the model on a small card. Without,
it draws what the released model draws: the row to compare with.

Its threat model is the weakest there is: someone with the weights, no image, no knowledge of the target, no training.

Differences from a source: there is no paper with this attack on text-to-image models known to us; quantising and
dequantising weights in 8 and 4 bit is a test of the unlearning package erasus (papers' facts: neighbours.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.contracts.attack import Attack, UsualBudget
from harness.core.registry import register


@dataclass(frozen=True)
class Parameters:
    """It has none; the rounding is a key of its entry, since other attacks may begin with it too."""


@register("attack")
class AsReleased(Attack):
    """No training: the scores of the released model, rounded or not."""

    name = "as_released"
    version = 1
    takes_steps = False
    trains_released_weights = False
    Parameters = Parameters
    budgets = {"": UsualBudget(0, 1)}

    @classmethod
    def passes_an_example(cls, parameters):
        """Return 0: nothing is trained."""
        return 0.0

    def adapt(self, model, concept, protection, budget, run):
        """Raise ValueError: no stage adapts (`takes_steps`)."""
        raise ValueError("as_released takes no step: it has no adaptation")

    def load(self, model, folder) -> None:
        """Load nothing: there are no checkpoints."""

    def unload(self, model) -> None:
        """Restore nothing."""
