"""What was computed from files, kept between runs in the user's cache folder. Without such a folder nothing is kept."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core.files import write_json


def cache_folder() -> Path | None:
    """Return the program's folder for files that can be made again; None if the user has no home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "immunitybench"


class Memory:
    """JSON values computed from files; a value counts while size and modification time of its file are the same."""

    def __init__(self, name: str):
        folder = cache_folder()
        self.file = None if folder is None else folder / name
        self.is_changed = False
        self.known: dict[str, list] = {}
        if self.file is not None:
            with contextlib.suppress(OSError, ValueError):
                known = json.loads(self.file.read_text(encoding="utf-8"))
                self.known = known if isinstance(known, dict) else {}

    def of(self, path: Path, make: Callable[[Path], Any]) -> Any:
        """Return the value of a file: the kept one, or `make(path)`. Raises OSError if the file cannot be read."""
        stat, name = path.stat(), str(path.resolve())
        state = [stat.st_size, stat.st_mtime_ns]
        kept = self.known.get(name)
        if not (isinstance(kept, list) and len(kept) == 3 and kept[:2] == state):
            kept = self.known[name] = [*state, make(path)]
            self.is_changed = True
        return kept[2]

    def save(self) -> None:
        """Keep what is new for the next run; a folder that cannot be written only costs time."""
        if self.is_changed and self.file is not None:
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.file, self.known)
        self.is_changed = False
