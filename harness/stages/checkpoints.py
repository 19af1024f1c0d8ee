"""Which adapted models are kept, since whole fine-tuned UNets would fill the disk.

A checkpoint larger than the suite's `keep_checkpoint_mb` is deleted when the images of its trajectory are drawn. The
stage stays committed, with its record and the drawn images. If the weights are needed again (for images with other
prompts), the adaptation runs again, under the same key. A stage's kind names the folder that may be deleted as `spare`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from harness.core import registry
from harness.core.identity import Stage
from harness.store.store import Store


def gone_but_needed(stages: Mapping[str, Stage], store: Store) -> frozenset[str]:
    """Return the committed stages of a unit whose spare folder was deleted but is needed again."""
    return frozenset(
        key
        for key, stage in stages.items()
        if (folder := _spare(key, stage, store)) is not None
        and store.has(stage.kind, key)
        and not folder.is_dir()
        and not _are_read(key, stages, store)
        and _had(key, stage, store)
        and not (store.bring(stage.kind, key) and store.bring_spare(stage.kind, key))
    )


def thin(stages: Mapping[str, Stage], store: Store, keep_mb: float | None) -> None:
    """Delete spare folders above `keep_mb` megabytes per step (None: none) that the unit's stages no longer need."""
    if keep_mb is None:
        return
    for key, stage in stages.items():
        folder = _spare(key, stage, store)
        if folder is None or not folder.is_dir() or not store.is_here(stage.kind, key):
            continue
        sizes = [sum(p.stat().st_size for p in step.rglob("*") if p.is_file()) for step in folder.iterdir()]
        if max(sizes, default=0) > keep_mb * 1e6 and _are_read(key, stages, store):
            away = folder.parent.parent / f".old.{uuid.uuid4().hex}"  # removed later if a kill comes between
            os.replace(folder, away)
            shutil.rmtree(away, ignore_errors=True)


def spared(stages: Mapping[str, Stage], store: Store) -> list[str]:
    """Return the stages of a unit whose spare folder is here."""
    return [key for key, stage in stages.items() if (folder := _spare(key, stage, store)) and folder.is_dir()]


def _spare(key: str, stage: Stage, store: Store) -> Path | None:
    """Return the folder of a stage that may be deleted after use, on this machine; None: its kind has none."""
    spare = registry.get("stage", stage.kind).spare
    return None if spare is None else store.folder(stage.kind, key) / spare


def _had(key: str, stage: Stage, store: Store) -> bool:
    """Return whether a committed stage had files in its spare folder: one of its kind may have been asked for none."""
    spare = registry.get("stage", stage.kind).spare
    return any(name.startswith(f"{spare}/") for name in store.record(stage.kind, key)["contents"])


def _are_read(key: str, stages: Mapping[str, Stage], store: Store) -> bool:
    """Return whether every stage of the unit that reads a stage is committed."""
    readers = {k: s for k, s in stages.items() if key in {read.key for read in s.inputs.values()}}
    return all(store.has(stage.kind, k) for k, stage in readers.items())
