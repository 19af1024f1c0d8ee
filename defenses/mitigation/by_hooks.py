"""Defenses that leave the weights as they are and release a hook with their parameters."""

from __future__ import annotations

from typing import ClassVar

from harness.contracts.defense import Defense
from harness.contracts.hooks import HookSpec
from harness.contracts.protection import Protection, ThreatModel
from harness.core.described import as_json


class DrawingMitigation(Defense):
    """Releases the sampling hook of its name."""

    threat_model: ClassVar[ThreatModel] = ThreatModel(must_honour=("sampling_hooks",))
    uses = frozenset()

    def protect(self, model, targets, preserved, run) -> Protection:
        """Release the hook."""
        return Protection(sampling=(HookSpec(self.name, as_json(self.parameters)),))


class TrainingMitigation(Defense):
    """Releases the adaptation hook `hook`."""

    hook: ClassVar[str]
    threat_model: ClassVar[ThreatModel] = ThreatModel(must_honour=("adaptation_hooks",))
    uses = frozenset()

    def protect(self, model, targets, preserved, run) -> Protection:
        """Release the hook."""
        return Protection(adaptation=(HookSpec(self.hook, as_json(self.parameters)),))
