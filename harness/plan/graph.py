"""The graph that a suite asks for: stages by key, units of them for workers, and the measurements that they serve.

Most work of the grid is shared: stages are content-addressed, so two measurements that need the same stage name the
same key, and it is done once. What varies last is done together: an adaptation, the images sampled from its trajectory
and their scores form one *unit*, which is what an executor hands to a worker; the stages of a unit are committed one by
one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from harness.contracts.task import Measurement
from harness.core.identity import Input, Stage


@dataclass(frozen=True)
class Unit:
    """Stages that one worker does in a row, each committed by itself."""

    name: str
    stages: tuple[str, ...]
    needs: frozenset[str]  # keys of stages of other units


@dataclass
class Plan:
    """The graph: stages by key, units in an order that respects their needs, and the measurements they serve."""

    suite: str
    stages: dict[str, Stage] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)  # name of a task -> its kind, in the order of the suite

    def read(self, key: str) -> Input:
        """Return a stage as the input of another."""
        return Input(self.stages[key].kind, key)

    def upstream(self) -> Callable[[str], frozenset[str]]:
        """Return a function from a key to itself and the keys of all that it needs."""
        closure: dict[str, frozenset[str]] = {}

        def upstream(key: str) -> frozenset[str]:
            if key not in closure:
                inputs = self.stages[key].inputs.values()
                closure[key] = frozenset({key}).union(*(upstream(read.key) for read in inputs))
            return closure[key]

        return upstream
