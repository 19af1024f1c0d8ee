"""The form of an immunization task's entry in a suite."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.suite.spec import ConceptName, MethodSpec, ProtectedSet, TaskSpec


class ImmunizationSpec(TaskSpec):
    """What is protected, what must stay learnable, and whether the concept is erased first."""

    erase: MethodSpec | None = None
    targets: Annotated[list[ProtectedSet], Field(min_length=1, max_length=10_000)]
    innocents: list[ConceptName] = []
    preserve: list[ConceptName] = []

    def flat_targets(self) -> list[str]:
        """Return the targets of all protected sets, in order."""
        return [concept for together in self.targets for concept in together]

    def concept_names(self) -> list[str]:
        """Return targets, innocents and preserved concepts."""
        return list(dict.fromkeys([*self.flat_targets(), *self.innocents, *self.preserve]))

    def methods(self) -> dict[tuple[str, ...], tuple[str, MethodSpec]]:
        """Return the eraser, if there is one."""
        return {("erase",): ("defense", self.erase)} if self.erase is not None else {}

    def most_together(self) -> int:
        """Return the size of the largest protected set."""
        return max(map(len, self.targets), default=1)
