"""Mitigations at inference: a defense works on a model that has memorized, and releases sampling hooks."""

from __future__ import annotations

from harness.core.registry import register
from harness.stages.protect import Protect


@register("stage")
class Mitigate(Protect):
    """Run a mitigation on a state of the model."""

    name = "mitigate"
    after = ("images", "erase", "immunize", "memorize")
    is_layer = True
    restorable = True
