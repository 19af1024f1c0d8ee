"""A checked suite with all that it names resolved, ready to be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core.concept import Concept
from harness.model.source import ModelSource
from harness.model.tokens import Tokens
from harness.suite import yaml_source
from harness.suite.spec import METHOD_SECTIONS, AttackSpec, DefenseSpec, MethodSpec, Suite

Mistake = tuple[tuple, str]
"""(path in the suite, message)"""


class LoadedSuite:
    """A checked suite with all that it names resolved, ready to be planned."""

    def __init__(self, suite: Suite, source: yaml_source.YamlSource, folder: Path):
        self.suite = suite
        self.source = source
        self.folder = folder  # relative paths in the suite start here
        self.parameters: dict[tuple[str, ...], Any] = {}  # ("defenses", "0") -> parameters instance
        self.broken: frozenset[str] = frozenset()  # sections that could not be read in full; empty once loaded
        self.concepts: dict[str, Concept] = {}
        self.general: Concept | None = None  # the general images (`harness.suite.general`)
        self.model: ModelSource | None = None  # None while there are mistakes
        self.tokens: Tokens | None = None  # the model's tokenizer; None where this machine does not have it yet
        self.found: dict[str, Any] = {}  # name of a task -> what its `check_concepts` read and its `plan` uses
        self.notices: list[str] = []
        """What was ignored, changed, cut or assumed of the user's files and texts, one line each."""

    def methods(self) -> list[tuple[tuple[str | int, ...], str, MethodSpec | None]]:
        """Return (path, kind, method) of every method of the suite; None where its entry is wrong."""
        entries: list[tuple[tuple[str | int, ...], str, MethodSpec | None]] = [
            ((section, index), kind, spec)
            for section, kind in METHOD_SECTIONS.items()
            for index, spec in enumerate(getattr(self.suite, section))
        ]
        for name, task in self.suite.tasks.items():
            entries += [(("tasks", name, *path), kind, spec) for path, (kind, spec) in task.methods().items()]
        return entries

    def budget(self, index: int) -> tuple[tuple[int, ...], int]:
        """Return (steps, batch size) of an attack that is built. Raises ValueError when the suite leaves them open."""
        from harness.core import registry

        spec = self.suite.attacks[index]
        return spec.budget(registry.get("attack", spec.method).budgets.get(spec.preset or ""))

    def defenses_in(self, task: str) -> list[tuple[int, DefenseSpec]]:
        """Return (index, defense) of the defenses that are made in a task."""
        return [
            (index, spec)
            for index, spec in enumerate(self.suite.defenses)
            if spec is not None and task in (spec.tasks or [task])
        ]

    def attacks_on(self, task: str) -> list[tuple[int, AttackSpec]]:
        """Return (index, attack) of the attacks that are made in a task."""
        return [
            (index, spec)
            for index, spec in enumerate(self.suite.attacks)
            if spec is not None and task in (spec.tasks or [task])
        ]
