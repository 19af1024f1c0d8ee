"""Which adapted models are kept: whole fine-tuned UNets fill a disk, and adapters do not.

A checkpoint above the suite's `keep_checkpoint_mb` goes when the images of its trajectory are drawn. The stage stays
committed: its record, and what was drawn. Whoever needs the weights again (images under other prompts, say) has the
adaptation done anew, under the same key.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping

from harness.core.identity import Stage
from harness.store.layout import CHECKPOINTS
from harness.store.store import Store


def gone_but_needed(stages: Mapping[str, Stage], store: Store) -> frozenset[str]:
    """Return the committed adaptations among a unit's stages whose checkpoints are gone and wanted again."""
    return frozenset(
        key
        for key, stage in stages.items()
        if stage.kind == "adapt" and store.has("adapt", key) and _is_gone(key, store)
        if not _are_read(key, stages, store)
    )


def thin(stages: Mapping[str, Stage], store: Store, keep_mb: float | None) -> None:
    """Delete checkpoints of more than `keep_mb` megabytes (None: none) that no stage of the unit reads any more."""
    for key, stage in stages.items():
        if keep_mb is None or stage.kind != "adapt" or not store.has("adapt", key) or _is_gone(key, store):
            continue
        folder = store.path("adapt", key) / CHECKPOINTS
        sizes = [sum(p.stat().st_size for p in step.rglob("*") if p.is_file()) for step in folder.iterdir()]
        if max(sizes, default=0) > keep_mb * 1e6 and _are_read(key, stages, store):
            away = folder.parent.parent / f".old.{uuid.uuid4().hex}"  # swept, should a kill come between
            os.replace(folder, away)
            shutil.rmtree(away, ignore_errors=True)


def _is_gone(key: str, store: Store) -> bool:
    return not (store.path("adapt", key) / CHECKPOINTS).is_dir()


def _are_read(key: str, stages: Mapping[str, Stage], store: Store) -> bool:
    """Tell whether every stage of the unit that reads an adaptation is committed."""
    return all(store.has(other.kind, k) for k, other in stages.items() if key in other.inputs.values())
