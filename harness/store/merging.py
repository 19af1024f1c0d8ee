"""`merge`: the stages of several machines in one store. A key with different results in two of them is refused."""

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
from harness.core.identity import digest_of_file, digest_of_json
from harness.store.layout import CHECKPOINTS
from harness.store.store import RECORD, Store

MOST_TOLD = 20


@dataclass(frozen=True)
class Merged:
    """The result of a merge."""

    copied: int
    known: int  # were there already, the same


def merge(sources: Sequence[str], into: str) -> Merged:
    """Copy every committed stage of the sources into a store, each at once; nothing is copied when two disagree.

    Folders are results folders (`runs`) or stores. Raises UserMistake for what is no store, for stages whose record
    does not fit their key, and for every key that holds other content elsewhere.
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
            there = wanted.get((kind, key)) or (target.path(kind, key) if target.has(kind, key) else None)
            if there is None:
                wanted[kind, key] = path
            elif _agree(_content(path), _content(there)):
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
    """Return the store of a results folder, or the folder itself where it is one."""
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
    return identity is not None and digest_of_json(identity)[:32] == key


def _content(path: Path) -> dict[str, str]:
    """Return the content of a stage by file, without its record, which contains time and machine."""
    return {
        file.relative_to(path).as_posix(): digest_of_file(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file != path / RECORD
    }


def _agree(one: dict[str, str], other: dict[str, str]) -> bool:
    """Return whether two stages have the same content; one of them may lack its checkpoints."""
    if all(any(name.startswith(f"{CHECKPOINTS}/") for name in each) for each in (one, other)):
        return one == other
    kept = [{n: d for n, d in each.items() if not n.startswith(f"{CHECKPOINTS}/")} for each in (one, other)]
    return kept[0] == kept[1]


def _copy(path: Path, final: Path) -> None:
    """Copy a stage so that it is there as a whole or not at all."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".old.{uuid.uuid4().hex}"  # removed by `sweep` after a kill
    shutil.copytree(path, temporary)
    sync_files(temporary)
    os.rename(temporary, final)
