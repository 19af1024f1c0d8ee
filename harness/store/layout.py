"""Names of files and folders inside a committed stage that more than one room reads."""

from __future__ import annotations

CHECKPOINTS = "checkpoints"
"""Of an adaptation: a folder for each step. It may be gone from a committed stage (`harness.stages.checkpoints`)."""
SCORES = "scores.json"
"""Of a stage that scores: {"about": {...}, "values": [{"step": 0, "prompt": 0, "value": 0.5}, ...]}.

`about` may hold direction, unit, range, backbone, preprocessing and library, all words. `prompt` is the index of a
prompt, or null where a value is of all prompts together. Values are finite: a stage fails where one is not."""


def step_folder(step: int) -> str:
    """Return the folder name of a step; names sort as numbers do."""
    return f"step_{step:07d}"
