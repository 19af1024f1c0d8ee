"""The measurements of a plan with their labels as attributes: what tests of plans read."""

from __future__ import annotations

from types import SimpleNamespace

from harness.plan import Plan


def trials(plan: Plan) -> list[SimpleNamespace]:
    """Return each measurement: its labels, `sample` (what is observed), `scores`, `steps` and `released` (or "")."""
    return [
        SimpleNamespace(
            **each.labels,
            sample=each.observed,
            scores=each.scores,
            steps=each.steps,
            released=each.needs.get("immunize", ""),
        )
        for each in plan.measurements
    ]


def reads(plan: Plan, key: str) -> dict[str, str]:
    """Return role -> key of what a stage reads."""
    return {role: read.key for role, read in plan.stages[key].inputs.items()}
