"""Where finished stages are kept: `<store>/<kind>/<key>/`, with a commit record.

`harness.store.cached` is the same with a bucket behind it, of which such a folder is the local part.

A stage writes into a temporary folder next to its final one; the last step renames it to `<key>`. A folder without
`record.json` is ignored. Readers need no lock. A lock on the stage's work folder separates two processes that do the
same stage at the same time; the folder also holds the state from which a long stage resumes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.core.errors import UserMistake, one_line
from harness.core.files import is_alive, open_to_others, sync_folder, write_json
from harness.core.locks import is_older, locked, try_locked
from harness.core.machine import host
from harness.store import contents
from harness.store.layout import RECORD

DAMAGED = ".damaged"
"""The folder of a store for damaged stages."""
SAVED_STATE = "state.json"
"""The file that `harness.model.run.Run.save_state` writes last: a training can go on from there."""
WORK_DAYS = 60
"""Saved states of stages are kept for so long after they were last written."""


class Damaged(UserMistake):
    """A committed stage is not what was committed."""

    def __init__(self, message: str, kind: str, key: str):
        super().__init__(message)
        self.kind, self.key = kind, key

    def __reduce__(self):
        return (type(self), (self.messages[0], self.kind, self.key))


class Store:
    """Finished stages by kind and key, shared by all suites that name the same folder."""

    url: str | None = None
    """Of the objects behind the folder; None: there are none."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def folder(self, kind: str, key: str) -> Path:
        """Return where the stage's files are on this machine, or would be."""
        return self.root / kind / key

    def path(self, kind: str, key: str) -> Path:
        """Return the folder of a stage, with its files if it is committed."""
        return self.folder(kind, key)

    def has(self, kind: str, key: str) -> bool:
        """Return whether the stage is committed."""
        return self.is_here(kind, key)

    def is_here(self, kind: str, key: str) -> bool:
        """Return whether the stage is committed, with its files on this machine."""
        return os.path.isfile(f"{self.root}/{kind}/{key}/{RECORD}")  # called for thousands of stages at each start

    def kinds(self, *, committed_only: bool = True) -> list[str]:
        """Return the kinds of stages that have a folder here, sorted; by default those with a committed stage."""
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if not committed_only or self.committed(name))

    def committed(self, kind: str) -> set[str]:
        """Return the keys of all committed stages of a kind."""
        return self.here(kind)

    def here(self, kind: str) -> set[str]:
        """Return the keys of the committed stages of a kind whose files are on this machine."""
        try:
            with os.scandir(self.root / kind) as entries:
                names = [entry.name for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {name for name in names if self.is_here(kind, name)}

    def record(self, kind: str, key: str) -> dict[str, Any]:
        """Return the commit record. Raises FileNotFoundError when the stage is not committed."""
        return json.loads(self.raw_record(kind, key))

    def raw_record(self, kind: str, key: str) -> bytes:
        """Return the commit record as it was written, fast. Raises FileNotFoundError as `record` does."""
        with open(f"{self.root}/{kind}/{key}/{RECORD}", "rb", buffering=0) as file:
            return file.readall()

    def kind_of(self, key: str) -> str | None:
        """Return the kind of a committed stage, whose key names no other; None if there is no such stage."""
        return next((kind for kind in self.kinds(committed_only=False) if self.has(kind, key)), None)

    def know(self, stages: Iterable[tuple[str, str]]) -> None:
        """Prepare for `record` of these (kind, key). Nothing to do here, as in the next five: see `CachedStore`."""

    def bring(self, kind: str, key: str, *, is_shared: bool = False) -> bool:
        """Bring a committed stage to this machine; return whether it is here."""
        return self.is_here(kind, key)

    def bring_all(self, stages: Iterable[tuple[str, str]]) -> None:
        """Bring committed stages to this machine."""

    def push(self, kind: str, key: str, *, replace: bool = False) -> None:
        """Push a stage that is here to where other machines find it; `replace`: in place of the one there."""

    def push_spare(self, kind: str, key: str) -> None:
        """Push the spare files of a stage that are here."""

    def bring_spare(self, kind: str, key: str) -> bool:
        """Bring the spare files of a stage that is here without them; return whether they are here."""
        return False

    def require(self, kind: str, key: str) -> None:
        """Raise Damaged if a committed stage's files are not what was committed. A process reads each file once."""
        why = contents.damage(self.folder(kind, key))
        if why is not None:
            raise self._damaged(kind, key, why)

    def require_for_reading(self, kind: str, key: str) -> None:
        """Raise Damaged with advice, for readers that do not run stages. A stage that is not here is no damage."""
        if self.has(kind, key):
            try:
                self.require(kind, key)
            except Damaged as damaged:
                advice = "`verify --set-aside`, then `run`, make it anew"
                raise Damaged(f"{damaged}; {advice}", kind, key) from None

    def content(self, kind: str, key: str, name: str) -> bytes:
        """Return the content of a small file of a committed stage. Raises Damaged if it is not what was committed.

        Fast, for thousands of files: the record is searched for the file's digest, not parsed.
        """
        folder = f"{self.root}/{kind}/{key}"
        try:
            with open(f"{folder}/{name}", "rb", buffering=0) as file:
                content = file.readall()
        except FileNotFoundError:
            raise self._damaged(kind, key, f"{name} is missing") from None
        record = self.raw_record(kind, key)
        if hashlib.sha256(content).hexdigest().encode() not in record:
            contents.require_digests(record, self.root)
            raise self._damaged(kind, key, f"{name} is not what was committed")
        return content

    def _damaged(self, kind: str, key: str, why: str) -> Damaged:
        try:
            label = one_line(self.record(kind, key).get("label", ""), 80)
        except (OSError, ValueError, AttributeError):
            label = ""
        what = f"{self.root}/{kind}/{key}" + (f" ({label})" if label else "")
        return Damaged(f"{what}: damaged: {one_line(why)}", kind, key)

    def damages(self) -> Iterator[Damaged]:
        """Yield what is damaged in the store, reading every file; folders that lack a record too."""
        for kind in self.kinds(committed_only=False):
            for folder in sorted((self.root / kind).iterdir()):
                if not folder.name.startswith("."):
                    why = contents.damage(folder)
                    if why is not None:
                        yield self._damaged(kind, folder.name, why)

    def set_aside(self, kind: str, key: str) -> Path:
        """Move a damaged stage out of the way, so that it is made anew; return its new place."""
        place = self.root / DAMAGED / f"{kind}-{key}-{uuid.uuid4().hex[:8]}"
        place.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process was first
            os.replace(self.folder(kind, key), place)
        return place

    @contextlib.contextmanager
    def locked_work_folder(self, kind: str, key: str) -> Iterator[Path]:
        """Hold the stage's work folder for this process alone; a second process waits here.

        The folder survives a kill (its files are what a stage resumes from) and is removed by `commit`. The file of
        the lock is removed when the block ends, however it ends.
        """
        folder = self.root / ".work" / f"{kind}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # if it is empty: there is nothing to resume from

    def clean_failed(self, work_folder: Path) -> None:
        """Remove the work folder of a stage that failed, unless it holds the saved state of a training.

        The caller holds its lock. A training that ran out of memory, for one, goes on from its state with other
        settings; everything else that a failed stage left is of no use.
        """
        if not any(work_folder.rglob(SAVED_STATE)):
            shutil.rmtree(work_folder, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, kind: str, key: str, *, replace: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield (folder, record) to fill; if the block ends without an exception, one rename commits both.

        `replace`: the new result replaces a committed one. When another process committed the same key first, its
        result stays and ours is dropped.
        """
        parent = self.root / kind
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f".{key}.{host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        record: dict[str, Any] = {}
        try:
            yield folder, record
            open_to_others(folder)
            # written last: a record means that all other files are there
            write_json(folder / RECORD, contents.sealed(folder, record))
            sync_folder(folder)
            final = self.folder(kind, key)
            if final.exists() and (replace or not self.is_here(kind, key)):
                os.replace(final, parent / f".old.{uuid.uuid4().hex}")
            try:
                os.rename(folder, final)
            except OSError:
                if not self.is_here(kind, key):
                    raise
            sync_folder(parent)
            shutil.rmtree(self.root / ".work" / f"{kind}-{key}", ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> int:
        """Remove folders that dead processes of this machine left behind; return how many."""
        removed = 0
        for folder in self.root.glob("*/.*"):
            parts = folder.name.split(".")  # "", key, host, pid, random
            is_old = folder.name.startswith(".old.")
            is_ours = len(parts) == 5 and parts[2] == host() and parts[3].isascii() and parts[3].isdigit()
            is_orphan = is_ours and not is_alive(int(parts[3]))
            if folder.is_dir() and (is_old or is_orphan):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed

    def sweep_work(self, days: float = WORK_DAYS) -> int:
        """Remove locks that no process holds, and work folders that nothing has touched for `days`.

        Return how many folders were removed.
        """
        removed = 0
        for lock in self.root.glob(".work/*.lock"):
            with try_locked(lock):
                pass  # the file goes with the lock
        for folder in self.root.glob(".work/*"):
            if folder.suffix == ".lock" or not folder.is_dir():
                continue
            with try_locked(folder.with_suffix(".lock")) as is_free:
                if is_free and is_older(folder, days):
                    shutil.rmtree(folder, ignore_errors=True)
                    removed += 1
        return removed
