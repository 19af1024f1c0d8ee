"""Where finished stages are kept: `<store>/<kind>/<key>/`, with a commit record.

A stage writes into a temporary folder beside its place, which is renamed to `<key>` last. A folder without its record
`record.json` does not exist for us. Readers need no lock; two processes that do the same stage at the same time are
kept apart by a lock on the stage's work folder, which also holds what a long stage saved to resume from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.core.files import is_alive, sync_folder, write_json

RECORD = "record.json"


class Store:
    """Finished stages by kind and key, shared by all suites that name the same folder."""

    def __init__(self, root: Path):
        self.root = Path(root)

    def path(self, kind: str, key: str) -> Path:
        """Return where the stage's files are, or will be."""
        return self.root / kind / key

    def has(self, kind: str, key: str) -> bool:
        """Return whether the stage is committed."""
        return os.path.isfile(f"{self.root}/{kind}/{key}/{RECORD}")  # asked for thousands of stages at each start

    def kinds(self) -> list[str]:
        """Return the kinds of stages that have a folder here, sorted."""
        try:
            with os.scandir(self.root) as entries:
                names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in names if self.committed(name))

    def committed(self, kind: str) -> set[str]:
        """Return the keys of all committed stages of a kind."""
        try:
            with os.scandir(self.root / kind) as entries:
                names = [entry.name for entry in entries if not entry.name.startswith(".")]
        except (FileNotFoundError, NotADirectoryError):
            return set()
        return {name for name in names if self.has(kind, name)}

    def record(self, kind: str, key: str) -> dict[str, Any]:
        """Return the commit record. Raises FileNotFoundError when the stage is not committed."""
        return json.loads((self.path(kind, key) / RECORD).read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def locked_work_folder(self, kind: str, key: str) -> Iterator[Path]:
        """Hold the stage's work folder for this process alone; a second process waits here.

        The folder survives a kill (its files are what a stage resumes from) and is removed by `commit`.
        """
        import fcntl

        folder = self.root / ".work" / f"{kind}-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        lock_path = folder.with_suffix(".lock")
        with open(lock_path, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(parents=True, exist_ok=True)  # another process may have committed and removed it
            yield folder

    @contextlib.contextmanager
    def writing(self, kind: str, key: str, *, replace: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield (folder, record) to fill; on leaving without an exception both are committed by one rename.

        `replace` puts the new result in the place of a committed one. When another process committed the same key
        first, its result stays and ours is dropped.
        """
        parent = self.root / kind
        parent.mkdir(parents=True, exist_ok=True)
        folder = parent / f".{key}.{_host()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        record: dict[str, Any] = {}
        try:
            yield folder, record
            write_json(folder / RECORD, record)  # last in the folder: a record promises all the rest
            sync_folder(folder)
            final = self.path(kind, key)
            if final.exists() and (replace or not self.has(kind, key)):
                os.replace(final, parent / f".old.{uuid.uuid4().hex}")
            try:
                os.rename(folder, final)
            except OSError:
                if not self.has(kind, key):
                    raise
            sync_folder(parent)
            shutil.rmtree(self.root / ".work" / f"{kind}-{key}", ignore_errors=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> int:
        """Remove the folders that ended processes of this machine left behind; return how many."""
        removed = 0
        for folder in self.root.glob("*/.*"):
            parts = folder.name.split(".")  # "", key, host, pid, random
            is_old = folder.name.startswith(".old.")
            is_ours = len(parts) == 5 and parts[2] == _host() and parts[3].isascii() and parts[3].isdigit()
            is_orphan = is_ours and not is_alive(int(parts[3]))
            if folder.is_dir() and (is_old or is_orphan):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed


def _host() -> str:
    """Return a short name of this machine without dots."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
