"""Shared by executors: the state of a walk over the plan, and its summary."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.core import disk
from harness.plan.graph import Plan, Unit


@dataclass
class Summary:
    """The result of a walk over the plan."""

    done: int = 0  # units done in this run
    cached: int = 0  # units that had nothing to do
    failed: tuple[tuple[str, str], ...] = ()  # (unit name, message); unit names may repeat
    blocked: tuple[tuple[str, str], ...] = ()  # (unit name, name of the failed unit that it needs)
    is_interrupted: bool = False
    stopped: str = ""  # why no further units were handed out, although some were ready
    lost: str = ""  # what the executor lost, without which it could not go on


class Walk:
    """The state of a walk over the units: which are ready, running, done, failed or blocked."""

    def __init__(self, plan: Plan, is_done: Callable[[str], bool]):
        """`is_done` returns whether the stage with a key is committed and need not be done again."""
        self.plan = plan
        self.missing: dict[int, set[int]] = {}
        self.dependents: dict[int, list[int]] = {}
        self.ready: deque[int] = deque()
        self.running: set[int] = set()
        self.done: set[int] = set()
        self.failed: dict[int, str] = {}
        self.blocked: dict[int, int] = {}
        self.stopped = ""
        self.owner = owner = {k: i for i, unit in enumerate(plan.units) for k in unit.stages}
        self._remade: set[str] = set()
        cached = {i for i, unit in enumerate(plan.units) if all(is_done(k) for k in unit.stages)}
        wanted = set(range(len(plan.units))) - cached
        self.cached = cached
        for index in sorted(wanted):
            needs = {owner[k] for k in plan.units[index].needs} & wanted
            self.missing[index] = needs
            for need in needs:
                self.dependents.setdefault(need, []).append(index)
            if not needs:
                self.ready.append(index)
        self.total = len(wanted)

    @property
    def is_finished(self) -> bool:
        """Whether every unit is done, failed or blocked, or none is handed out any more and none is running."""
        if self.stopped and not self.running:
            return True
        return len(self.done) + len(self.failed) + len(self.blocked) == self.total

    def take(self, index: int | None = None) -> int | None:
        """Return the index of a ready unit and mark it running, or None when none is ready. `index`: this one."""
        if not self.ready or self.stopped:
            return None
        if index is None:
            index = self.ready.popleft()
        else:
            self.ready.remove(index)
        self.running.add(index)
        return index

    def give_back(self, index: int) -> None:
        """Make a running unit ready again, before all others: its worker was lost."""
        self.running.discard(index)
        self.ready.appendleft(index)

    def unit(self, index: int) -> Unit:
        """Return the unit of an index."""
        return self.plan.units[index]

    def finish(self, index: int) -> None:
        """Mark a unit done; units that waited only for it become ready, before units of other branches."""
        self.running.discard(index)
        self.done.add(index)
        for dependent in self.dependents.get(index, ()):
            self.missing[dependent].discard(index)
            if not self.missing[dependent] and dependent not in self.blocked:
                self.ready.append(dependent)

    def fail(self, index: int, message: str) -> list[int]:
        """Mark a unit failed; return the units that it blocks. On a full disk no further units are handed out."""
        self.running.discard(index)
        self.failed[index] = message
        if disk.is_full(message):  # each of the others would train on, and then fail when it saves
            self.stop(message)
        newly: list[int] = []
        stack = list(self.dependents.get(index, ()))
        while stack:
            dependent = stack.pop()
            if dependent not in self.blocked:
                self.blocked[dependent] = index
                newly.append(dependent)
                stack += self.dependents.get(dependent, ())
        return newly

    def again(self, index: int, lost: Sequence[str]) -> bool:
        """Put a running unit back, behind the units that make the `lost` stages anew.

        Returns False, and changes nothing, if that cannot help: a unit that makes one failed, or made it anew before.
        """
        owners = {key: self.owner[key] for key in lost}
        for key, other in owners.items():
            if other in self.failed or other in self.blocked:
                return False
            if key in self._remade and (other in self.done or other == index):
                return False
        self._remade |= owners.keys()
        self.running.discard(index)
        waits = set(owners.values()) - {index}
        for other in waits & (self.done | self.cached):
            self.total += other in self.cached
            self.done.discard(other)
            self.cached.discard(other)
            self.missing[other] = set()
            self.dependents[other] = []
            self.ready.append(other)
        for other in waits:
            self.dependents.setdefault(other, []).append(index)
        self.missing[index] = waits
        if not waits:
            self.ready.append(index)
        return True

    def stop(self, why: str) -> None:
        """Hand out no further units; those that are running may end."""
        self.stopped = self.stopped or why

    def abandon(self, message: str) -> None:
        """Mark everything that is not done as failed, when the executor cannot continue."""
        for index in set(self.missing) - self.done - self.failed.keys() - self.blocked.keys():
            self.failed[index] = message
        self.running.clear()

    def summary(self, *, is_interrupted: bool = False, lost: str = "") -> Summary:
        """Return the state of the walk."""
        return Summary(
            done=len(self.done),
            cached=len(self.cached),
            failed=tuple((self.unit(i).name, m) for i, m in self.failed.items()),
            blocked=tuple((self.unit(i).name, self.unit(j).name) for i, j in self.blocked.items()),
            is_interrupted=is_interrupted,
            stopped=self.stopped,
            lost=lost,
        )
