"""No defense: the model is released unchanged. Every gap is measured against this row."""

from __future__ import annotations

from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel
from harness.core.registry import register


@register("defense")
class NoDefense(Defense):
    """Release the model unchanged (after erasure, in the re-learning task)."""

    name = "none"
    version = 1
    threat_model = ThreatModel()
    uses = frozenset()

    def protect(self, model, targets, preserved, run) -> Protection:
        """Return an empty protection."""
        return Protection()
