"""Joint: IMMA on the union of the concepts, a baseline for several concepts at once.

One lower level adapts to the images of all concepts together, and the upper level ascends the loss on them: IMMA
(`defenses/imma.py`) with X' = union of X'_n. MIMA's paper (AAAI 2025) compares with a baseline called JT; its exact
definition could not be read, so this baseline has another name.
"""

from __future__ import annotations

from defenses.imma import Imma, ImmaBase, immunize
from harness.contracts.protection import Protection
from harness.core.registry import register


@register("defense")
class Joint(ImmaBase):
    """IMMA on the union of the protected concepts; batches mix their images."""

    name = "joint"
    version = 1
    presets = Imma.presets

    @classmethod
    def check_task(cls, parameters, targets, preserved) -> list[tuple[str, str]]:
        """Reject several concepts for textual_inversion: a new word names one concept."""
        if parameters.lower == "textual_inversion" and targets > 1:
            return [("lower", "textual_inversion teaches one word; joint trains on several concepts at once")]
        return super().check_task(parameters, targets, preserved)

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return the immunized attention weights."""
        return immunize(model, targets, preserved, self.parameters, run)
