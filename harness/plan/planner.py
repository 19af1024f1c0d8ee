"""From a checked suite to its plan: tasks give their measurements, and units are put in order."""

from __future__ import annotations

from dataclasses import replace

from harness.contracts.task import FILLED, Measurement
from harness.core import registry
from harness.core.garbage import collection_paused
from harness.plan.builder import Builder
from harness.plan.graph import Plan, Unit
from harness.suite.loaded import LoadedSuite


def make(loaded: LoadedSuite) -> Plan:
    """Return the plan of a checked suite; it depends on the suite only."""
    with collection_paused():
        build = Builder(loaded)
        for name, spec in loaded.suite.tasks.items():
            cls = registry.get("task", spec.kind)
            build.plan.tasks[name] = spec.kind
            with registry.blamed(cls, f"planning the task '{name}' failed"):
                measured = cls(None).plan(name, spec, build)
                build.plan.measurements += (_named(name, measurement) for measurement in measured)
        build.plan.units = list(build.units.values())
        return ordered(build.plan)


def _named(task: str, measurement: Measurement) -> Measurement:
    """Return a measurement with the label by which its rows are found again, the name of its task.

    Raises ValueError for a label that rows fill themselves.
    """
    taken = sorted(measurement.labels.keys() & FILLED)
    if taken:
        raise ValueError(f"'{taken[0]}' is no label: rows fill that column themselves")
    if "task" in measurement.labels:
        return measurement
    return replace(measurement, labels={"task": task, **measurement.labels})


def ordered(plan: Plan) -> Plan:
    """Give each stage to one unit and sort the units so that what is needed comes first; return the plan."""
    owner: dict[str, int] = {}
    units: list[Unit] = []
    for unit in plan.units:
        own = tuple(k for k in unit.stages if k not in owner)
        if not own:
            continue
        if own != unit.stages:
            needs = {read.key: None for k in own for read in plan.stages[k].inputs.values() if read.key not in own}
            unit = Unit(unit.name, own, tuple(needs))
        owner.update(dict.fromkeys(own, len(units)))
        units.append(unit)
    depth: dict[int, int] = {}

    def depth_of(index: int) -> int:
        if index not in depth:
            depth[index] = 0
            depth[index] = max((depth_of(owner[n]) + 1 for n in units[index].needs), default=0)
        return depth[index]

    order = sorted(range(len(units)), key=lambda i: (depth_of(i), i))
    plan.units = [units[i] for i in order]
    return plan
