"""A run for diagnostics: the only code that reads a plan's measurements for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.leaderboard import Gates, leaderboard
from harness.analysis.measurements import Measurements
from harness.analysis.paper_rows import PaperRow
from harness.contracts.diagnostic import ReleasedModel
from harness.plan.graph import Plan
from harness.results import adaptation_cost
from harness.store import provenance
from harness.store.store import Store
from harness.suite.spec import DEFAULT_TASK

if TYPE_CHECKING:
    from pandas import DataFrame

    from harness.analysis.claims import Claims
    from harness.core.identity import Stage


@dataclass(frozen=True)
class RunResults:
    """The plan, the committed stages, and the numbers made from them (`contracts.diagnostic.MeasuredRun`)."""

    plan: Plan
    store: Store
    folder: Path
    model_name: str
    gates: Gates
    rows: DataFrame
    """All scores; see `harness.results.rows`."""
    papers: Sequence[PaperRow] = ()

    def rows_of(self, kind: str) -> DataFrame:
        """Return the rows of the tasks of one kind."""
        names = [name for name, own in self.plan.tasks.items() if own == kind]
        is_whole = len(names) == len(self.plan.tasks)
        return self.rows if is_whole else self.rows[self.rows["task"].isin(names)]

    @cached_property
    def measurements(self) -> Measurements:
        """The rows of immunization tasks, grouped."""
        return Measurements(self.rows_of(DEFAULT_TASK))

    @cached_property
    def claims(self) -> Claims:
        """The leaderboard and the worst case with their ranks, and the headlines."""
        from harness.analysis.claims import claims

        return claims(self.measurements, leaderboard(self.measurements, self.gates))

    @property
    def leaderboard(self) -> list[dict[str, Any]]:
        """The lines of leaderboard.csv."""
        return self.claims.lines

    @cached_property
    def adaptations(self) -> Mapping[str, Mapping[str, Any]]:
        """The records of finished adaptations, by key."""
        return adaptation_cost.records(self.plan, self.store)

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """The lines of adaptation_cost.csv."""
        return adaptation_cost.lines(self.plan, self.adaptations)

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The planned stages, by key."""
        return self.plan.stages

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.plan.suite

    @property
    def protected_together(self) -> dict[str, int]:
        """The size of the largest protected set of each task."""
        largest: dict[str, int] = {}
        for measurement in self.plan.measurements:
            about = measurement.labels
            largest[about["task"]] = max(largest.get(about["task"], 0), len(about.get("protected", ())))
        return largest

    @property
    def erasing_tasks(self) -> frozenset[str]:
        """The tasks that start with an erasure."""
        labels = (measurement.labels for measurement in self.plan.measurements)
        return frozenset(about["task"] for about in labels if about.get("defense") == "original")

    @property
    def origin(self) -> str:
        """A sentence on program, packages, devices and dates of the adaptations; "" if none is done."""
        return provenance.sentence(self.plan.suite, self.model_name, list(self.adaptations.values()))

    def released(self) -> Iterator[ReleasedModel]:
        """Yield every committed released model once, in the order of the plan."""
        seen: set[tuple] = set()
        for measurement in self.plan.measurements:
            about, key = measurement.labels, measurement.needs.get("immunize")
            if key is None or "defense" not in about or not self.store.has("immunize", key):
                continue  # also if another kind of task draws from a released model with other labels
            name = (about["task"], about["defense"], about["protected"], about["seed"])
            if name in seen:
                continue
            seen.add(name)
            if self.store.is_here("immunize", key):
                self.store.require_for_reading("immunize", key)
            yield ReleasedModel(
                task=about["task"],
                defense=about["defense"],
                method=about["method"],
                profile=about["profile"],
                protected=about["protected"],
                seed=about["seed"],
                is_weak=about["is_weak"],
                key=key,
                stage=self.plan.stages[key],
                store=self.store,
            )
