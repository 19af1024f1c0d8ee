"""Base of the defenses that only freeze tensors: their threat model, and mask.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defenses.freezing import masks
from harness.contracts.defense import Defense
from harness.contracts.protection import Protection, ThreatModel


class Freezing(Defense):
    """Base class of defenses that freeze tensors. `FreezingDiagnostic` reports their masks."""

    threat_model = ThreatModel(must_honour=("frozen",))

    @classmethod
    def mask_without_data(cls, parameters: Any, starts: Mapping[str, float]) -> frozenset[str] | None:
        """Return the tensors frozen if the mask were learned from the same start without data; None: not learned.

        `starts` are the logits before learning, by tensor; mask.csv keeps them as `logit_before`.
        """
        return None

    def keep(self, folder: Path, elements: Mapping[str, int], protection: Protection) -> None:
        """Write mask.csv if something is frozen, or the method reports details of single tensors."""
        if protection.frozen or protection.details:
            masks.write(folder, elements, protection)
