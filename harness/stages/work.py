"""A stage being done: its description and surroundings, with the steps that several kinds share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.core import parameters, registry
from harness.core.identity import Stage
from harness.model.run import Run
from harness.stages.workplace import Workplace
from harness.store.store import Store


@dataclass
class StageAtWork:
    """One stage being done: its description and surroundings, with the steps that several kinds share."""

    stage: Stage
    workplace: Workplace
    store: Store
    run: Run
    folder: Path  # becomes the committed folder

    def input(self, role: str, kind: str) -> Path:
        """Return the folder of a committed input."""
        return self.store.path(kind, self.stage.inputs[role])

    def files(self, role: str, split: str) -> list[Path]:
        """Return the images of a split of an `images` input, in order."""
        return sorted((self.input(role, "images") / split).glob("*.png"))

    def method(
        self, kind: str, described: Mapping[str, Any] | None = None, local: Mapping[str, Any] = MappingProxyType({})
    ) -> Any:
        """Return the method of the stage, or another that its parameters describe, with its parameters."""
        component = described["component"] if described else self.stage.component
        own = described["parameters"] if described else self.stage.parameters["parameters"]
        cls = registry.get(kind, component.partition("@")[0])
        given = {**own, **(local if described else self.stage.local.get("parameters", {}))}
        values, mistakes = parameters.resolve(cls, given)
        if mistakes:
            raise ValueError("; ".join(message for _, message in mistakes))
        return cls(values)

    def base(self):
        """Return the base model in its released state."""
        from harness.model.pipeline import warm

        with self.run.ledger.phase("load"):
            return warm(self.workplace.source, self.run.device)

    def released(self):
        """Return (model, protection): the base, erased if the task erases, with the defense's changes over it.

        An attacker who restores components has the tensors from before the defense there in the place of the defense's:
        the base model's, or those of the erased model that the task begins with.
        """
        from harness.contracts.protection import Protection

        model = self.base()
        restored = tuple(f"{component}." for component in self.stage.parameters.get("restore", ()))
        protection, changed = Protection(), {}
        for role in ("erase", "immunize"):
            if role in self.stage.inputs:
                protection = Protection.load(self.input(role, role))
                is_kept = role == "erase" or not restored
                changed |= {n: t for n, t in protection.tensors.items() if is_kept or not n.startswith(restored)}
        model.overlay(changed)
        return model, protection


