"""Names of files and folders inside a committed stage that more than one room reads."""

from __future__ import annotations

RECORD = "record.json"
"""The record of a committed stage; a folder without it is not committed."""
CHECKPOINTS = "checkpoints"
"""In an adaptation: one folder per step inside. A committed stage may lack it (`harness.stages.checkpoints`)."""
SCORES = "scores.json"
"""File of a scoring stage: {"about": {...}, "values": [{"step": 0, "prompt": 0, "value": 0.5}, ...]}.

`about` may hold direction, unit, range, backbone, preprocessing and library, all words. `prompt` is the index of a
prompt, or null for a value of all prompts together. Values are finite: otherwise the stage fails."""


def step_folder(step: int) -> str:
    """Return the folder name of a step; names sort as numbers do."""
    return f"step_{step:07d}"
