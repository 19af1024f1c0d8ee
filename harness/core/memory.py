"""What was computed from files, kept between runs in the user's cache folder. Without such a folder nothing is kept."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core import machine
from harness.core.files import write_json

_GRAIN_NS = 2_000_000_000
"""Two edits within the clock's grain of a file system have one time; FAT has the coarsest, two seconds."""


def is_settled(stat: os.stat_result) -> bool:
    """Return whether a later edit of the file will change its modification time."""
    return abs(time.time_ns() - stat.st_mtime_ns) > _GRAIN_NS


class Memory:
    """JSON values computed from files; a value counts while size and modification time of its file are the same."""

    def __init__(self, name: str):
        cache = machine.user_cache()
        self.file = cache / "immunitybench" / name if cache else None
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
            kept = [*state, make(path)]
            if is_settled(stat):
                self.known[name] = kept
                self.is_changed = True
        return kept[2]

    def save(self) -> None:
        """Keep what is new for the next run; a folder that cannot be written only costs time."""
        if self.is_changed and self.file is not None:
            with contextlib.suppress(OSError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.file, self.known)
        self.is_changed = False
