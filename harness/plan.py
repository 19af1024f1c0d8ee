"""The graph that a suite asks for: stages by key, units of them for workers, and the trials that they serve.

A trial of the grid is (task, defense, protected set, attack, concept, seed). Most of its work is shared: stages are
content-addressed, so two trials that need the same stage name the same key, and it is done once. What varies last is
done together: an adaptation, the images sampled from its trajectory and their scores form one *unit*, which is what an
executor hands to a worker; the stages of a unit are committed one by one. `harness.planner` walks the grid,
`harness.plan_stages` describes the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.identity import Stage
from harness.suite import LoadedSuite


@dataclass(frozen=True)
class Trial:
    """One row group of the table: where its images and scores come from."""

    task: str
    defense: str  # label in the suite; "original" is the model before it was erased
    method: str
    profile: str
    protected: tuple[str, ...]
    attack: str
    attacker: str
    concept: str
    role: str  # target | innocent | utility | real (the attack split itself, scored as if drawn) | floor (another's)
    seed: int
    steps: tuple[int, ...]  # 0: before the attack
    sample: str  # key of the sample stage; of the images stage for role "real"
    scores: Mapping[str, str]  # metric label -> key of the score stage
    probes: int = 0  # how often an adaptive attacker tried before
    is_weak: bool = False  # the defense was made weak on purpose
    released: str = ""  # key of the defense's stage; "" where there is none


@dataclass(frozen=True)
class Unit:
    """Stages that one worker does in a row, each committed by itself."""

    name: str
    stages: tuple[str, ...]
    needs: frozenset[str]  # keys of stages of other units


@dataclass
class Plan:
    """The graph: stages by key, units in an order that respects their needs, and the trials they serve."""

    suite: str
    stages: dict[str, Stage] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


def make(loaded: LoadedSuite) -> Plan:
    """Return the plan of a checked suite: the same for the same suite, of which alone it is made."""
    from harness.planner import Planner

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
