"""From a checked suite to its plan: tasks are asked for their measurements, units are put in order."""

from __future__ import annotations

from harness.plan.graph import Plan, Unit
from harness.suite.loaded import LoadedSuite


def make(loaded: LoadedSuite) -> Plan:
    """Return the plan of a checked suite: the same for the same suite, of which alone it is made."""
    from harness.tasks.immunization import Planner

    result = Planner(loaded).plan()
    _order(result)
    return result


def _order(plan: Plan) -> None:
    """Give each stage to one unit and sort the units so that what is needed comes first."""
    owner: dict[str, int] = {}
    units: list[Unit] = []
    for unit in plan.units:
        own = tuple(k for k in unit.stages if k not in owner)
        if not own:
            continue
        if own != unit.stages:
            needs = {i for k in own for i in plan.stages[k].inputs.values() if i not in own}
            unit = Unit(unit.name, own, frozenset(needs))
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
