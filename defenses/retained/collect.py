"""The bounded defenses of a run, read from the folders of their protections, and the unbounded ones beside them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.contracts.protection import CURVES
from harness.core.identity import canonical_json

if TYPE_CHECKING:
    from harness.contracts.diagnostic import MeasuredRun, ReleasedModel


@dataclass(frozen=True)
class Immunized:
    """A model that a defense with the parameter `retain` released: its labels, its bound, and its rounds."""

    task: str
    defense: str
    method: str
    protected: tuple[str, ...]
    seed: int
    retain: Mapping[str, Any] | None
    """The parameter as JSON; None: no bound."""
    others: str
    """All other settings, as one text: equal where two defenses differ in `retain` alone."""
    curve: Sequence[Mapping[str, float]]
    """A row for each round; () without a bound."""

    @property
    def bound(self) -> float | None:
        """The bound; None: none."""
        return None if self.retain is None else float(self.retain["bound"])

    @property
    def settings(self) -> str:
        """All settings but the bound, as one text."""
        rest = {name: value for name, value in (self.retain or {}).items() if name != "bound"}
        return self.others + canonical_json(rest)


def of_run(run: MeasuredRun) -> list[Immunized]:
    """Return the bounded models of a run that are committed, in the plan's order, and those that differ in that only.

    [] if nothing is bounded.
    """
    found = [_read(model) for model in run.released()]
    compared = {(each.task, each.others) for each in found if each.retain is not None}
    return [each for each in found if (each.task, each.others) in compared]


def _read(model: ReleasedModel) -> Immunized:
    parameters = dict(model.stage.parameters.parameters)
    retain = parameters.pop("retain", None)
    targets = model.stage.parameters.targets
    is_first = targets is not None and len(targets) < len(model.protected)
    others = canonical_json([model.method, model.is_weak, is_first, parameters])
    curve: list[dict[str, float]] = []
    if retain is not None and CURVES in model.files:
        with open(model.folder / CURVES, encoding="utf-8", newline="") as file:
            curve = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return Immunized(model.task, model.defense, model.method, model.protected, model.seed, retain, others, tuple(curve))
