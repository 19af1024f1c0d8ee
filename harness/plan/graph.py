"""The graph of a suite: stages by key, units of stages for workers, and the measurements that need them.

Most work of the grid is shared: stages are content-addressed, so two measurements that need the same stage name the
same key, and it is done once. The last steps are done together: an adaptation, the images sampled from its trajectory
and their scores form one *unit*, which an executor hands to a worker. The stages of a unit are committed one by one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from harness.contracts.task import Measurement
from harness.core.identity import Input, Stage


@dataclass(slots=True)  # not frozen: see Stage
class Unit:
    """Stages that one worker does in a row, each committed by itself."""

    name: str
    stages: tuple[str, ...]
    needs: tuple[str, ...]  # keys of stages of other units, each once


@dataclass
class Plan:
    """The graph: stages by key, units ordered by their needs, and the measurements."""

    suite: str
    stages: dict[str, Stage] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)  # name of a task -> its kind, in the order of the suite

    def read(self, key: str) -> Input:
        """Return a stage as the input of another one."""
        return Input(self.stages[key].kind, key)

    def needed(self, keys: Iterable[str], known: Iterable[str] = ()) -> set[str]:
        """Return these keys and all that their stages need, directly or not; `known`: the result for other keys."""
        stages, found, ahead = self.stages, set(known), list(keys)
        while ahead:
            key = ahead.pop()
            if key not in found:
                found.add(key)
                ahead += [read.key for read in stages[key].inputs.values()]
        return found
