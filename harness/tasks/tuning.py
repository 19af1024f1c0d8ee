"""The search for a setting of a tuned defense, as stages: proposals, probes on tuning concepts, and the choice.

A probe is what a defended model of the grid is: the defense is run on each protected set of `tuning`, attacked by one
attack, and drawn from. Its parameters come from a proposal, which knows the results of all earlier batches. No table
measures a tuning concept, and no seed of the search is one of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from harness.contracts.state import ModelState
from harness.contracts.task import Measurement
from harness.core import registry, search, seeds
from harness.core.described import as_json
from harness.core.identity import Input
from harness.core.tuning import PROPOSAL
from harness.plan.builder import Builder
from harness.stages.tune import AssessParameters, ChooseParameters, ProposeParameters
from harness.suite.loaded import LoadedSuite
from harness.suite.spec import DefenseSpec, Suite
from harness.tasks.grid import Released


class TuningGrid(Protocol):
    """What the search needs of the grid of one protected set of tuning concepts."""

    targets: tuple[str, ...]
    spec: Any
    only: frozenset[str] | None

    def erased(self) -> ModelState: ...
    def released(
        self, index: int, seed: int, erased: ModelState, setting: Mapping[str, Input] = ..., called: str = ...
    ) -> Released: ...
    def before(self, released: Released, name: str, role: str) -> Measurement: ...
    def attacked_by(self, index: int, released: Released, name: str, role: str) -> Measurement: ...
    def real(self, name: str) -> Measurement: ...
    def floor(self, name: str, other: str) -> Measurement: ...


def metrics_of(suite: Suite) -> dict[str, str]:
    """Return the metrics that judge probes: label -> direction."""
    known = registry.names("metric")
    directed = {
        spec.name: registry.get("metric", spec.method).direction
        for spec in suite.metrics
        if spec is not None and spec.method in known
    }
    wanted = suite.tuning.metrics
    return {
        name: direction
        for name, direction in directed.items()
        if direction != "none" and (wanted is None or name in wanted)
    }


def space_of(cls: type, spec: DefenseSpec, values: Any) -> dict[str, Any]:
    """Return the space of a tuned defense, as JSON values."""
    return search.as_json(search.given(spec.tune.space) or cls.search_space(values))


def count(loaded: LoadedSuite, task: str) -> int:
    """Return the number of attacked models and of models before any attack that tuning adds to a task."""
    tuning = loaded.suite.tuning
    if tuning is None:
        return 0
    each = sum(2 * len(together) + len(tuning.innocents) for together in tuning.targets)
    probes = sum(spec.tune.probes for _, spec in loaded.defenses_in(task) if spec.tune is not None)
    return each * probes * (len(loaded.suite.seeds or ()) if tuning.per_seed else 1)


def search_for(build: Builder, grids: Sequence[TuningGrid], index: int, seed: int) -> Input:
    """Add the search of a tuned defense under one seed; return the stage that chooses its setting.

    `grids`: one for each protected set of the tuning, `index`: of the defense in the suite.
    """
    return _Search(build, grids, index, seed).chosen()


class _Search:
    """The probes of one tuned defense under one seed."""

    def __init__(self, build: Builder, grids: Sequence[TuningGrid], index: int, seed: int):
        self.build, self.grids, self.index, self.seed = build, grids, index, seed
        self.spec = build.suite.defenses[index]
        self.tuning = build.suite.tuning
        self.cls = registry.get("defense", self.spec.method)
        self.values = build.loaded.parameters["defenses", str(index)]
        self.identity, self.local = build.identified(self.cls, self.values)
        self.space = space_of(self.cls, self.spec, self.values)
        self.metrics = metrics_of(build.suite)
        self.attack = next(i for i, a in enumerate(build.suite.attacks) if a.name == self.tuning.attack)
        self.none = next(i for i, d in enumerate(build.suite.defenses) if d.method == "none")
        for grid in grids:
            grid.only = frozenset(self.metrics)
        self.erased = [grid.erased() for grid in grids]

    def chosen(self) -> Input:
        """Add all probes, and the choice among them."""
        total, at_once = self.spec.tune.probes, self.spec.tune.at_once
        new = search.explored(total)
        results: dict[str, Input] = {}
        for first in range(0, new, at_once):
            known = dict(results)
            for probe in range(first, min(first + at_once, new)):
                results[f"result.{probe}"] = self._probe(probe, known, {"place": probe - first}, 0)
        known = dict(results)
        for repeat in range(total - new):
            pair = repeat // 2 + 1  # both of a pair have one seed, so that only their settings differ
            results[f"result.{new + repeat}"] = self._probe(new + repeat, known, {"repeat": repeat}, pair)
        label = f"the setting of {self.spec.name} from {total} probes{self._seed_text()}"
        key = self.build.stage(
            "choose",
            ChooseParameters(parameters=self.identity, search=search.VERSION, floor=self.tuning.floor),
            component=registry.component(self.cls),
            reads_model=False,
            inputs=results,
            label=label,
            local=self._local(),
        )
        self.build.unit(f"choose {label}", [key])
        return self.build.read(key)

    def _probe(self, probe: int, known: Mapping[str, Input], which: Mapping[str, int], pair: int) -> Input:
        """Add a probe: its proposal, its release for each protected set with what is measured on it, its assessment."""
        build, total = self.build, self.spec.tune.probes
        called = f"{self.spec.name} (probe {probe + 1} of {total})"
        proposed = build.stage(
            "propose",
            ProposeParameters(parameters=self.identity, space=self.space, search=search.VERSION, **which),
            component=registry.component(self.cls),
            reads_model=False,
            inputs=known,
            seed=seeds.derive("tuning", self.seed, "propose"),
            label=f"setting {probe + 1} of {total} for {self.spec.name}{self._seed_text()}",
            local=self._local(),
        )
        build.unit(build.plan.stages[proposed].label, [proposed])
        proposal = build.read(proposed)
        # below 2**31 as a suite's own seeds; one for all defenses, which so meet the same attacks
        seed = seeds.derive("tuning", self.seed, pair) % 2**31
        measured: dict[str, Input] = {}
        n_targets = n_innocents = 0

        def add(what: str, place: int, found: Measurement) -> None:
            measured.update({f"{what}.{place}.{metric}": build.read(key) for metric, key in found.scores.items()})

        for grid, erased in zip(self.grids, self.erased, strict=True):
            bare = grid.released(self.none, seed, erased)
            own = grid.released(self.index, seed, erased, {PROPOSAL: proposal}, called)
            for name in grid.targets:
                add("before", n_targets, grid.before(bare, name, "target"))
                add("undefended", n_targets, grid.attacked_by(self.attack, bare, name, "target"))
                add("real", n_targets, grid.real(name))
                add("start", n_targets, grid.before(own, name, "target"))
                add("attacked", n_targets, grid.attacked_by(self.attack, own, name, "target"))
                n_targets += 1
            for name in grid.spec.innocents:
                add("kept_none", n_innocents, grid.before(bare, name, "utility"))
                add("floor", n_innocents, grid.floor(name, grid.targets[0]))
                add("kept", n_innocents, grid.before(own, name, "utility"))
                n_innocents += 1
        gates = build.suite.gates
        key = build.stage(
            "assess",
            AssessParameters(
                objective=self.tuning.objective,
                floor=self.tuning.floor,
                steps=build.loaded.budget(self.attack)[0],
                metrics=self.metrics,
                targets=n_targets,
                innocents=n_innocents,
                min_recovery=gates.min_recovery,
                min_headroom=gates.min_headroom,
                is_repeat=True if pair else None,
            ),
            reads_model=False,
            inputs={PROPOSAL: proposal, **measured},
            label=f"{called}{self._seed_text()}",
            what="assess",
        )
        build.unit(f"assess {called}{self._seed_text()}", [key])
        return build.read(key)

    def _seed_text(self) -> str:
        return f", seed {self.seed}" if self.tuning.per_seed else ""

    def _local(self) -> dict[str, Any]:
        return {"parameters": as_json(self.local)} if self.local else {}
