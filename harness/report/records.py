"""The records of the stages behind a run: how they were made, and their cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from harness.contracts.stage import kinds_in_order
from harness.store.store import Store


@dataclass
class Cost:
    """The total cost of the stages of one kind and method."""

    kind: str
    component: str
    stages: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    forward_passes: float = 0.0
    backward_passes: float = 0.0


@dataclass
class Summary:
    """All stages behind a run."""

    stages: int = 0
    missing: int = 0
    costs: list[Cost] = field(default_factory=list)
    phases: list[tuple[str, float]] = field(default_factory=list)
    """(phase, seconds), longest first; for all stages together."""
    provenance: list[tuple[str, list[tuple[str, int]]]] = field(default_factory=list)
    """(name, [(value, number of stages)])."""

    @property
    def seconds(self) -> float:
        """The sum of all stages' seconds."""
        return sum(cost.seconds for cost in self.costs)


def summary(store: Store, scores: Iterable[str]) -> Summary:
    """Sum up the records of score stages and all their direct and indirect inputs, each stage once."""
    result = Summary()
    costs: dict[tuple[str, str], Cost] = {}
    phases: Counter[str] = Counter()
    counts: dict[str, Counter[str]] = {}
    for record in _walk(store, scores, result):
        kind, component = record["identity"]["kind"], record["identity"]["component"]
        cost = costs.setdefault((kind, component), Cost(kind, component))
        ledger = record["ledger"]
        cost.stages += 1
        cost.seconds += record["seconds"]
        cost.peak_memory_bytes = max(cost.peak_memory_bytes, ledger["peak_memory_bytes"] or 0)
        cost.forward_passes += ledger["forward_passes"]
        cost.backward_passes += ledger["backward_passes"]
        phases.update(ledger["seconds"])
        for name, value in _facts(record["provenance"]):
            counts.setdefault(name, Counter())[value] += 1
        result.stages += 1
    place = {kind: index for index, kind in enumerate(kinds_in_order())}
    result.costs = sorted(costs.values(), key=lambda c: (place.get(c.kind, len(place)), c.component))
    result.phases = phases.most_common()
    result.provenance = [(name, counted.most_common()) for name, counted in counts.items()]
    return result


def _walk(store: Store, scores: Iterable[str], result: Summary) -> Iterator[dict[str, Any]]:
    """Yield the record of each stage once; count those that are not in the store."""
    kinds = _kinds(store)
    waiting, seen = list(scores), set(scores)
    while waiting:
        key = waiting.pop()
        try:
            record = store.record(kinds[key], key)
            inputs = record["identity"]["inputs"].values()
        except (KeyError, OSError, ValueError, TypeError, AttributeError):
            result.missing += 1
            continue
        fresh = [upstream for upstream in inputs if upstream not in seen]
        seen.update(fresh)
        waiting += fresh
        yield record


def _kinds(store: Store) -> dict[str, str]:
    """Return key -> kind of every committed stage, since inputs are named only by key."""
    found: dict[str, str] = {}
    for kind in store.kinds():
        found |= dict.fromkeys(store.committed(kind), kind)
    return found


def _facts(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of a record's provenance."""
    git = provenance.get("git")
    if git:
        yield "code", f"{git['revision'][:12]}{', with changes not committed' if git['is_dirty'] else ''}"
    yield "immunitybench", str(provenance.get("immunitybench"))
    yield "device", str(provenance.get("device"))
    machine = provenance.get("machine") or {}
    yield "node", machine.get("host", "")
    yield "machine", f"{machine.get('system')}, {machine.get('processor')}, {machine.get('cores')} cores"
    yield "threads of a stage", str(provenance.get("threads"))
    yield "executor", str(provenance.get("executor"))
    sharding = provenance.get("sharding")
    if sharding:
        yield "sharding", ", ".join(f"{name} {value}" for name, value in sorted(sharding.items()))
    hastened = [name for name, is_on in sorted(provenance.get("speed", {}).items()) if is_on]
    if hastened:
        yield "speed", ", ".join(hastened)
    yield "Python", str(provenance.get("python"))
    for name, version in sorted((provenance.get("packages") or {}).items()):
        yield name, str(version)
