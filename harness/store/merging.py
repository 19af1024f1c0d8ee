"""`merge` brings the stages of several machines into one store. A key with different results is refused."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import UserMistake, one_line
from harness.core.files import sync_files
from harness.core.identity import key_of
from harness.store import contents
from harness.store.layout import CHECKPOINTS, RECORD
from harness.store.store import Store

MOST_TOLD = 20


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    copied: int
    known: int  # already there, with the same content


def merge(sources: Sequence[str], into: str) -> Merged:
    """Copy every committed stage of the sources into a store, each atomically; if two disagree, nothing is copied.

    Folders are results folders (`runs`) or stores. Raises UserMistake for folders that are not stores, for damaged
    stages, for stages whose record does not fit their key, and for every key whose content differs between stores.
    """
    target = Store(_store_in(Path(into), into, must_exist=False))
    stores = [(given, Store(_store_in(Path(given), given))) for given in sources]
    wanted: dict[tuple[str, str], Path] = {}
    known, wrong = 0, []
    for given, store in stores:
        for kind, key in _stages(store):
            path = store.path(kind, key)
            if any(file.is_symlink() for file in path.rglob("*")):
                wrong.append(f"{one_line(given)}: {kind}/{key}: holds a link; leave the stage out")
                continue
            if not _fits(path, key):
                wrong.append(f"{one_line(given)}: {kind}/{key}: its record does not fit its key; leave the stage out")
                continue
            why = contents.damage(path)
            if why is not None:
                wrong.append(f"{one_line(given)}: {kind}/{key}: {one_line(why)}; leave the stage out")
                continue
            there = wanted.get((kind, key)) or (target.path(kind, key) if target.has(kind, key) else None)
            if there is None:
                wanted[kind, key] = path
            elif _agree(path, there):
                known += 1
            else:
                label = one_line(_record(path).get("label", ""), 80)
                wrong.append(
                    f"{one_line(given)}: {kind}/{key} ({label}): the same stage has another result in "
                    f"{one_line(there.parent.parent)}; remove one of the two"
                )
    if wrong:
        more = len(wrong) - MOST_TOLD
        raise UserMistake(wrong[:MOST_TOLD] + ([f"... and {more} more"] if more > 0 else []))
    for (kind, key), path in wanted.items():
        _copy(path, target.path(kind, key))
    return Merged(len(wanted), known)


def _store_in(path: Path, given: str, must_exist: bool = True) -> Path:
    """Return the store of a results folder, or the folder itself if it is a store."""
    if (path / "store").is_dir():
        return path / "store"
    if Store(path).kinds():
        return path
    if path.is_file() or must_exist:
        raise UserMistake(f"{one_line(given)}: holds no store; name a folder of results, such as runs")
    return path / "store"


def _stages(store: Store) -> Iterator[tuple[str, str]]:
    for kind in store.kinds():
        for key in sorted(store.committed(kind)):
            yield kind, key


def _record(path: Path) -> dict:
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _fits(path: Path, key: str) -> bool:
    identity = _record(path).get("identity")
    return isinstance(identity, dict) and "parameters" in identity and key_of(identity) == key


def _agree(one: Path, other: Path) -> bool:
    """Return whether two stages have the same content, without their records, which hold time and machine.

    One of them may lack checkpoints. Tensors are compared, whatever the order of a file's header.
    """
    files = [
        {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file() and file.name != RECORD}
        for path in (one, other)
    ]
    if not all(any(name.startswith(f"{CHECKPOINTS}/") for name in each) for each in files):
        files = [{n: file for n, file in each.items() if not n.startswith(f"{CHECKPOINTS}/")} for each in files]
    mine, others = files
    return mine.keys() == others.keys() and all(contents.is_same_file(mine[name], others[name]) for name in mine)


def _copy(path: Path, final: Path) -> None:
    """Copy a stage atomically: whole, or not at all."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".old.{uuid.uuid4().hex}"  # `sweep` removes it after a kill
    shutil.copytree(path, temporary)
    sync_files(temporary)
    os.rename(temporary, final)
