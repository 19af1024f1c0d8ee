"""Names of files and folders inside a committed stage that more than one room reads."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"
"""Of an adaptation: a folder for each step. It may be gone from a committed stage (`harness.stages.checkpoints`)."""
SCORES = "scores.json"
"""Of a stage that scores: the description of the metric, and its values."""


def step_folder(step: int) -> str:
    """Return the folder name of a step; names sort as numbers do."""
    return f"step_{step:07d}"
