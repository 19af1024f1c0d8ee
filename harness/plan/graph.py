"""The graph that a suite asks for: stages by key, units of them for workers, and the trials that they serve.

A trial of the grid is (task, defense, protected set, attack, concept, seed). Most of its work is shared: stages are
content-addressed, so two trials that need the same stage name the same key, and it is done once. What varies last is
done together: an adaptation, the images sampled from its trajectory and their scores form one *unit*, which is what an
executor hands to a worker; the stages of a unit are committed one by one. `harness.tasks.immunization` walks the grid,
`harness.plan.builder` describes the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.core.identity import Stage


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


