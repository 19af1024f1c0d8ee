"""Diagnostic of bounds (`retain`): was each bound kept, and what does it trade for protection?

Files: retention.csv, .md and .png; retention_knob.csv and .png where defenses differ in nothing but their bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from defenses.retained import collect, section, tables
from defenses.retained.definitions import DEFINITIONS
from harness.contracts.diagnostic import Diagnostic, MeasuredRun, PageSection
from harness.contracts.table import Figure, Table
from harness.core.registry import register


@dataclass(frozen=True)
class Found:
    """The bounds of a run."""

    trajectories: Sequence[Mapping[str, Any]]
    """Lines of retention.csv."""
    summary: Sequence[Mapping[str, Any]]
    """A line for each training."""
    knob: Sequence[Mapping[str, Any]]
    """Lines of retention_knob.csv."""


@register("diagnostic")
class RetentionDiagnostic(Diagnostic):
    """Bounds on the loss on what must stay: whether they were kept, and utility and protection over the bound."""

    name = "retention"
    version = 1
    title = "Bounds on what must stay"
    definitions = DEFINITIONS

    def of(self, run: MeasuredRun) -> Found | None:
        """Return the trajectories of the run's bounded defenses; None if there are none."""
        found = collect.of_run(run)
        lines = tables.trajectories(found)
        if not lines:
            return None
        summary = tables.summaries(lines)
        return Found(lines, summary, tables.knob(found, summary, run.leaderboard, run.claims.worst))

    def files(self, found: Found, run: MeasuredRun) -> Iterator[Table | Figure]:
        """Yield the tables and figures that the module's docstring names."""
        from defenses.retained import figures

        yield Table("retention", tables.COLUMNS, found.trajectories, tables.sections(found.summary, found.knob))
        yield Figure("retention", partial(figures.draw_trajectories, found.trajectories))
        if found.knob:
            yield Table("retention_knob", tables.KNOB_COLUMNS, found.knob)
            yield Figure("retention_knob", partial(figures.draw_knob, found.knob))

    def section(self, folder: Path) -> PageSection | None:
        """Return the section on bounds; None if nothing was bounded."""
        return section.of_run(folder)
