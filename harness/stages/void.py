"""A void result: what a stage of a probe leaves when its training diverged, so that the search can go on.

Settings that a search tries may diverge. For a release that is measured this is a failure; for a probe it is a result,
the worst one. So a stage of a probe commits VOID with the reason, and stages that read it are void too, without any
work. Stages of a probe have the proposal among their inputs; only these may be void, so no measured result ever is.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from harness.core.files import write_json
from harness.core.finite import NothingDrawn
from harness.core.identity import Stage
from harness.core.tuning import PROPOSAL
from harness.store.store import Store

VOID = "void.json"
"""In the folder of a stage without a result: the reason."""
DIVERGED = (FloatingPointError, NothingDrawn)
"""Errors that say that values were not finite, or that an adapted model draws nothing."""


def reason(folder: Path) -> str | None:
    """Return why a committed stage has no result; None: it has one."""
    path = folder / VOID
    return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.is_file() else None


def of_inputs(stage: Stage, store: Store) -> str | None:
    """Return why one of the stages that a stage reads has no result; None: all have one."""
    reasons = (reason(store.path(read.kind, read.key)) for read in stage.inputs.values())
    return next((found for found in reasons if found is not None), None)


def is_of_probe(stage: Stage) -> bool:
    """Return whether a stage belongs to a probe, so that it may be void."""
    return PROPOSAL in stage.inputs


def write(folder: Path, why: str) -> None:
    """Leave the reason in a stage's folder, in place of anything that it wrote."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(folder / VOID, {"reason": why})
