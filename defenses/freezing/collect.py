"""The masks of a run, read from the folders of its defenses' protections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from defenses.freezing import masks
from defenses.freezing.base import Freezing
from defenses.freezing.masks import Mask
from harness.core import registry

if TYPE_CHECKING:
    from harness.contracts.diagnostic import MeasuredRun, ReleasedModel


def of_run(run: MeasuredRun) -> list[Mask]:
    """Return the masks of a run's defenses that are committed, each once, in the plan's order."""
    found = []
    for model in run.released():
        rows = masks.read(model.folder) if masks.FILE in model.files else None
        if rows is None:
            continue
        parameters = model.stage.parameters.parameters
        found.append(
            Mask(
                model.task,
                model.defense,
                model.method,
                model.profile,
                model.protected,
                model.seed,
                {row["tensor"]: int(row["elements"]) for row in rows},
                masks.frozen(rows),
                run.store.record("immunize", model.key)["ledger"]["numbers"],
                _without_data(model.method, parameters, rows),
                parameters,
                _given(model),
                model.key,
            )
        )
    return found


def _given(model: ReleasedModel) -> str:
    """Return which concepts of the protected set were given to the defense, and whether it is weak on purpose."""
    targets = model.stage.parameters.targets
    protects = "first" if targets is not None and len(targets) < len(model.protected) else "all"
    return f"{protects}, weak" if model.is_weak else protects


def _without_data(
    method: str, parameters: Mapping[str, Any], rows: Sequence[Mapping[str, str]]
) -> frozenset[str] | None:
    """Return the tensors that the method would freeze without data; None if its mask was not learned."""
    starts = {row["tensor"]: float(row["logit_before"]) for row in rows if row.get("logit_before")}
    cls = registry.get("defense", method)
    if not starts or not issubclass(cls, Freezing):
        return None
    return cls.mask_without_data(cls.Parameters(**parameters), starts)
