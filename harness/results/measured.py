"""A run as diagnostics see it: the one place that reads a plan's trials for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.analysis.measurements import Measurements
from harness.analysis.paper_rows import PaperRow
from harness.contracts.diagnostic import ReleasedModel
from harness.plan.graph import Plan
from harness.store import provenance
from harness.store.store import Store


@dataclass(frozen=True)
class RunResults:
    """What was planned, what is committed, and the general numbers (`contracts.diagnostic.MeasuredRun`)."""

    plan: Plan
    store: Store
    folder: Path
    model_name: str
    measurements: Measurements
    leaderboard: Sequence[Mapping[str, Any]]
    adaptations: Mapping[str, Mapping[str, Any]]
    """The records of the adaptations that are done, by key."""
    costs: Sequence[Mapping[str, Any]]
    papers: Sequence[PaperRow]

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.plan.suite

    @property
    def protected_together(self) -> dict[str, int]:
        """How many concepts the largest protected set of each task holds."""
        largest: dict[str, int] = {}
        for trial in self.plan.trials:
            largest[trial.task] = max(largest.get(trial.task, 0), len(trial.protected))
        return largest

    @property
    def erasing_tasks(self) -> frozenset[str]:
        """The tasks that begin with an erasure."""
        return frozenset(trial.task for trial in self.plan.trials if trial.defense == "original")

    @property
    def origin(self) -> str:
        """A sentence on program, packages, devices and days of the adaptations; "" where none is done."""
        return provenance.told(self.plan.suite, self.model_name, list(self.adaptations.values()))

    def released(self) -> Iterator[ReleasedModel]:
        """Yield every released model that is committed, once, in the order of the plan."""
        seen: set[tuple] = set()
        for trial in self.plan.trials:
            name = (trial.task, trial.defense, trial.protected, trial.seed)
            if name in seen or not trial.released or not self.store.has("immunize", trial.released):
                continue
            seen.add(name)
            yield ReleasedModel(
                task=trial.task,
                defense=trial.defense,
                method=trial.method,
                profile=trial.profile,
                protected=trial.protected,
                seed=trial.seed,
                is_weak=trial.is_weak,
                key=trial.released,
                stage=self.plan.stages[trial.released],
                folder=self.store.path("immunize", trial.released),
            )
